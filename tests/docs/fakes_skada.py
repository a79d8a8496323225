"""Stand-ins shaped like the classes of ``skada.deep`` that the page of recipes uses, and of skorch below them.

Names, signatures, the keys of a batch and the tuple that the module returns in train mode are theirs; the page uses the
real classes where these can be imported.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class DeepCoralLoss(nn.Module):
    """The distance of the features' covariances."""

    def forward(self, features_s, features_t, **kwargs):
        centred = [features - features.mean(0) for features in (features_s, features_t)]
        covariances = [features.t() @ features / (len(features) - 1) for features in centred]
        return (covariances[0] - covariances[1]).pow(2).mean()


class DomainAwareCriterion(nn.Module):
    """The base criterion on the source, and the adaptation's on both."""

    def __init__(self, base_criterion, adapt_criterion, reg=1):
        super().__init__()
        self.base_criterion, self.adapt_criterion, self.reg = base_criterion, adapt_criterion, reg

    def forward(self, y_pred, y_true):
        y_pred, _, features, sample_domain, _ = y_pred
        source = sample_domain >= 0
        adaptation = self.adapt_criterion(features_s=features[source], features_t=features[~source])
        return self.base_criterion(y_pred[source], y_true[source]) + self.reg * adaptation


class DomainAwareModule(nn.Module):
    """Returns a tuple in train mode, with features that a forward hook collected, and logits alone in eval mode."""

    def __init__(self, base_module, layer_name):
        super().__init__()
        self.base_module_, self.layer_name, self.intermediate_layers = base_module, layer_name, {}
        dict(base_module.named_modules())[layer_name].register_forward_hook(self._collect)

    def _collect(self, module, inputs, output):
        self.intermediate_layers[self.layer_name] = output.flatten(1)

    def forward(self, X, sample_domain=None):
        y_pred = self.base_module_(X)
        if not self.training:
            return y_pred
        return y_pred, None, self.intermediate_layers[self.layer_name], sample_domain, None


class DomainBalancedDataLoader:
    """Yields batches with as many source as target samples."""

    def __init__(self, X, y, sample_domain, batch_size):
        self.X, self.y, self.sample_domain, self.batch_size = X, y, sample_domain, batch_size

    def __iter__(self):
        source, target = (np.flatnonzero(self.sample_domain >= 0), np.flatnonzero(self.sample_domain < 0))
        for start in range(0, len(source), self.batch_size):
            chosen = np.concatenate([domain[start : start + self.batch_size] for domain in (source, target)])
            X, y, domains = (torch.as_tensor(values[chosen]) for values in (self.X, self.y, self.sample_domain))
            yield {"X": X, "sample_domain": domains}, y


class DomainAwareNet:
    """Fits a module in ``train_step``, which calls ``get_loss`` inside the closure that it gives to the optimizer."""

    def __init__(self, module, iterator_train, *, criterion, optimizer, batch_size, max_epochs, **options):
        parts = {name[len("module__") :]: value for name, value in options.items() if name.startswith("module__")}
        self.module_, self.criterion_ = module(**parts), criterion
        self.optimizer_ = optimizer(self.module_.parameters())
        self.iterator_train, self.batch_size, self.max_epochs = iterator_train, batch_size, max_epochs

    def fit(self, X, y, sample_domain=None):
        for _ in range(self.max_epochs):
            for batch in self.iterator_train(X, y, sample_domain, self.batch_size):
                self.module_.train()
                self.train_step(batch)
        return self

    def train_step(self, batch, **fit_params):
        def step_fn():
            self.optimizer_.zero_grad()
            loss = self.get_loss(self.module_(**batch[0]), batch[1], X=batch[0], training=True)
            loss.backward()
            return loss

        return {"loss": self.optimizer_.step(step_fn)}

    def get_loss(self, y_pred, y_true, X=None, training=False, **kwargs):
        return self.criterion_(y_pred, y_true)
