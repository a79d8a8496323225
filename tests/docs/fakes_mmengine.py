"""Stand-ins shaped like the classes of ``mmengine`` that the page of mmsegmentation 1.x uses.

Names, signatures and what calls what are the package's; the page uses the real classes where these can be imported.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn


class Registry(dict):
    """Builds what it registered from ``dict(type=name, ...)``."""

    def register_module(self):
        return lambda cls: self.setdefault(cls.__name__, cls)

    def build(self, cfg):
        options = dict(cfg)
        return self[options.pop("type")](**options)


HOOKS, MODELS, OPTIM_WRAPPERS = Registry(), Registry(), Registry()


def is_model_wrapper(model):
    return isinstance(model, nn.parallel.DistributedDataParallel)


def load_checkpoint(model, filename, map_location=None):
    model.load_state_dict(torch.load(filename, map_location=map_location)["state_dict"])


class BaseModel(nn.Module):
    """``train_step`` calls ``forward`` with ``mode="loss"`` and hands the sum of all losses to the wrapper."""

    def train_step(self, data, optim_wrapper):
        with optim_wrapper.optim_context(self):
            losses = self(**data, mode="loss")
        total = sum(loss for name, loss in losses.items() if "loss" in name)
        optim_wrapper.update_params(total)
        return {**{name: loss.detach() for name, loss in losses.items()}, "loss": total.detach()}


class OptimWrapper:
    """Owns scaling, accumulation and clipping; ``step`` is called once for every ``accumulative_counts`` updates."""

    def __init__(self, optimizer, accumulative_counts=1, clip_grad=None):
        self.optimizer = optimizer
        self.clip_grad_kwargs = clip_grad
        self._accumulative_counts = accumulative_counts
        self._inner_count = 0

    @contextlib.contextmanager
    def optim_context(self, model):
        yield

    def update_params(self, loss, step_kwargs=None, zero_kwargs=None):
        self.backward(loss / self._accumulative_counts)
        if self._inner_count % self._accumulative_counts == 0:
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss, **kwargs):
        loss.backward(**kwargs)
        self._inner_count += 1

    def zero_grad(self, **kwargs):
        self.optimizer.zero_grad(**kwargs)

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self._clip_grad()
        self.optimizer.step(**kwargs)

    def _clip_grad(self):
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, **self.clip_grad_kwargs)


class AmpOptimWrapper(OptimWrapper):
    """Steps through ``loss_scaler``; refuses to be built without a GPU."""

    def __init__(self, loss_scale="dynamic", **kwargs):
        assert torch.cuda.is_available(), "only available on a GPU"
        super().__init__(**kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.cuda.amp.GradScaler()

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)


class Hook:
    """Does nothing; ``priority`` orders hooks of one stage."""

    priority = "NORMAL"
