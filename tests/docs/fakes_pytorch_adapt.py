"""Stand-ins shaped like the classes of ``pytorch_adapt`` that its page uses.

Names, signatures, context keys and the quirks that matter to a plug-in are the package's; the page uses the real
classes where these can be imported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Models(dict):
    """By name: G, C and D."""


class Optimizers(dict):
    """By name: an optimizer, or a class and its options for ``DANN`` to build. Nothing else will do."""

    def __init__(self, store, keys=()):
        super().__init__(dict.fromkeys(keys, store) if isinstance(store, tuple) else store)

    def create_with(self, models):
        for key, value in self.items():
            if not isinstance(value, torch.optim.Optimizer):
                optimizer, options = value
                self[key] = optimizer(models[key].parameters(), **options)


class BaseHook:
    """A part of an iteration: context and losses in, what is new of both out."""

    def __init__(self):
        pass

    def __call__(self, inputs, losses=None):
        outputs, new = self.call(inputs, losses or {})
        assert set(new) == set(self._loss_keys()), "losses are those announced"
        assert set(outputs) <= set(self.out_keys), "outputs are those announced"
        return outputs, new

    @property
    def out_keys(self):
        return list(self._out_keys())


class FeaturesAndLogitsHook(BaseHook):
    """Computes what the context lacks."""

    def __init__(self, domains=("src", "target")):
        self.domains = domains

    def call(self, inputs, losses):
        outputs = {}
        for domain in self.domains:
            features, logits = f"{domain}_imgs_features", f"{domain}_imgs_features_logits"
            if features not in inputs:
                outputs[features] = inputs["G"](inputs[f"{domain}_imgs"])
            if logits not in inputs:
                outputs[logits] = inputs["C"]({**inputs, **outputs}[features])
        return outputs, {}

    def _loss_keys(self):
        return []

    def _out_keys(self):
        return [f"{domain}_imgs_features{kind}" for domain in self.domains for kind in ("", "_logits")]


class BaseWeighter:
    """Reduces the losses of an optimizer hook, in the order of their computation, to the one to differentiate."""

    def __init__(self, reduction, weights=None, scale=1):
        self.reduction, self.weights, self.scale = reduction, weights or {}, scale

    def __call__(self, losses):
        weighted = [loss * self.weights.get(name, 1) * self.scale for name, loss in losses.items()]
        total = self.reduction(weighted)
        components = {name: loss.item() for name, loss in zip(losses, weighted)}
        return total, {**components, "total": total.item()}


def zero_back_step(loss, optimizers, custom_backward=None):
    """Zeroes, differentiates and steps in one call, with no place between."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    if loss.grad_fn is not None:
        (custom_backward or torch.Tensor.backward)(loss)
        for optimizer in optimizers:
            optimizer.step()


class DANN:
    """Builds the optimizers, and makes a whole iteration in ``training_step``."""

    def __init__(self, models=None, optimizers=None, hook_kwargs=None):
        self.models, self.optimizers = models, optimizers
        optimizers.create_with(models)
        options = hook_kwargs or {}
        self.post_g = options.get("post_g", [])
        self.weighter = options.get("weighter", BaseWeighter(lambda losses: sum(losses) / len(losses)))

    def training_step(self, batch, **kwargs):
        context = {**self.models, **batch, **kwargs}
        losses = {}
        for domain in ("src", "target"):
            features = context[f"{domain}_imgs_features"] = self.models["G"](batch[f"{domain}_imgs"])
            answers = self.models["D"](2 * features.detach() - features)
            labels = batch[f"{domain}_domain"].float()
            losses[f"{domain}_domain_loss"] = F.binary_cross_entropy_with_logits(answers, labels)
        context["src_imgs_features_logits"] = self.models["C"](context["src_imgs_features"])
        losses["src_c_loss"] = F.cross_entropy(context["src_imgs_features_logits"], batch["src_labels"])
        for hook in self.post_g:
            outputs, new = hook(context, losses)
            context, losses = {**context, **outputs}, {**losses, **new}
        total, components = self.weighter(losses)
        zero_back_step(total, list(self.optimizers.values()), kwargs.get("custom_backward"))
        return {"total_loss": components}
