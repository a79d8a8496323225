"""Stand-ins shaped like the classes of SDAT's ``dalib`` and ``common`` and of Transfer-Learning-Library's ``tllib``.

Names, signatures, return values and the quirks that matter to a plug-in are theirs; what they compute is the least that
trains. The pages use the real classes where these can be imported.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn


class ImageClassifier(nn.Module):
    """Returns logits and features in training mode, logits alone in eval mode."""

    def __init__(self, backbone, num_classes, bottleneck_dim=256, finetune=True, pool_layer=None):
        super().__init__()
        self.backbone = backbone
        self.pool_layer = pool_layer or nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
        self.bottleneck = nn.Sequential(
            nn.Linear(backbone.out_features, bottleneck_dim), nn.BatchNorm1d(bottleneck_dim), nn.ReLU()
        )
        self.head = nn.Linear(bottleneck_dim, num_classes)
        self.features_dim = bottleneck_dim
        self.finetune = finetune

    def forward(self, x):
        features = self.bottleneck(self.pool_layer(self.backbone(x)))
        logits = self.head(features)
        return (logits, features) if self.training else logits

    def get_parameters(self, base_lr=1.0):
        return [
            {"params": self.backbone.parameters(), "lr": (0.1 if self.finetune else 1.0) * base_lr},
            {"params": self.bottleneck.parameters(), "lr": base_lr},
            {"params": self.head.parameters(), "lr": base_lr},
        ]


class DomainDiscriminator(nn.Sequential):
    """Ends in a sigmoid."""

    def __init__(self, in_feature, hidden_size):
        super().__init__(nn.Linear(in_feature, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 1), nn.Sigmoid())

    def get_parameters(self):
        return [{"params": self.parameters(), "lr": 1.0}]


class ConditionalDomainAdversarialLoss(nn.Module):
    """Takes logits and features of both domains, and holds the discriminator as a child."""

    def __init__(self, domain_discriminator, entropy_conditioning=False):
        super().__init__()
        self.domain_discriminator = domain_discriminator
        self.domain_discriminator_accuracy = None

    def forward(self, g_s, f_s, g_t, f_t):
        features, predictions = torch.cat([f_s, f_t]), torch.cat([g_s, g_t]).detach().softmax(1)
        seen = torch.einsum("nf,nc->nfc", features, predictions).flatten(1)
        seen = 2 * seen.detach() - seen  # the value is that of ``seen``, the gradient its opposite
        answers = self.domain_discriminator(seen)
        labels = torch.cat([torch.ones(len(f_s), 1), torch.zeros(len(f_t), 1)])
        self.domain_discriminator_accuracy = 100.0 * (answers.ge(0.5) == labels.bool()).float().mean()
        return F.binary_cross_entropy(answers, labels)


class MinimumClassConfusionLoss(nn.Module):
    """Takes target logits."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, logits):
        predictions = (logits / self.temperature).softmax(1)
        confusion = predictions.t() @ predictions
        return (confusion / confusion.sum(1, keepdim=True)).fill_diagonal_(0.0).sum() / logits.shape[1]


class SAM(torch.optim.Optimizer):
    """Steps twice; ``step()`` needs a closure, and ``state_dict()`` lacks what the base optimizer keeps."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, dict(rho=rho, adaptive=adaptive, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        length = torch.stack([p.grad.norm() for p in self._parameters()]).norm()
        for p in self._parameters():
            self.state[p]["e_w"] = p.grad * self.param_groups[0]["rho"] / (length + 1e-12)
            p.add_(self.state[p]["e_w"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self._parameters():
            p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure=None):
        assert closure is not None, "needs a closure"


class EMATeacher:
    """The host EMA: not a module, and ``update()`` gives its parameters new storage."""

    def __init__(self, model, alpha):
        self.model, self.alpha = model, alpha
        self.teacher = copy.deepcopy(model)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False

    def __call__(self, x):
        return self.teacher(x)

    def train(self, mode=True):
        self.teacher.train(mode)

    def update(self):
        for average, parameter in zip(self.teacher.parameters(), self.model.parameters()):
            average.data = self.alpha * average + (1 - self.alpha) * parameter


def update_bn(model, ema_model):
    """Copies statistics of those BatchNorms only that have ``bn`` in their names."""
    for (name, of_ema), (_, of_model) in zip(ema_model.named_modules(), model.named_modules()):
        if "bn" in name:
            of_ema.load_state_dict({**of_ema.state_dict(), **dict(of_model.named_buffers())})
