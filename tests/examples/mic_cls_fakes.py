"""A small host laid out and behaving like MIC's classification folder, written to disk for the launcher to run.

It has what the adapter must cope with: a training function that uses a global set under ``__main__`` only, a SAM that
calls ``super`` by the class's name, a classifier whose eval mode returns something else, a host EMA that copies it and
stays in train mode, BatchNorm, Dropout, a logger that closes ``sys.stdout``, and checkpoints of the student alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Optional

SAM = """
import torch


class SAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super(SAM, self).__init__(params, dict(rho=rho, adaptive=adaptive, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def _all(self):
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for _, p in self._all()]).norm() + 1e-12
        for group, p in self._all():
            self.state[p]["climbed"] = p.grad * (group["rho"] / norm)
            p.add_(self.state[p]["climbed"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for _, p in self._all():
            p.sub_(self.state[p]["climbed"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()
"""

LOGGER = """
import os
import sys


class Stream:
    def __init__(self, stream=sys.stdout):
        self.terminal = stream

    def write(self, message):
        self.terminal.write(message)

    def flush(self):
        self.terminal.flush()

    def close(self):
        self.terminal.close()


class CompleteLogger:
    def __init__(self, root, phase="train"):
        self.folder = os.path.join(root, "checkpoints")
        os.makedirs(self.folder, exist_ok=True)
        self.logger = Stream()
        sys.stdout = self.logger
        sys.stderr = self.logger

    def get_checkpoint_path(self, name):
        return os.path.join(self.folder, name + ".pth")

    def close(self):
        self.logger.close()
"""

HOST_EMA = """
from copy import deepcopy

import torch
from torch import nn


class EMATeacher(nn.Module):
    def __init__(self, model, alpha, pseudo_label_weight):
        super(EMATeacher, self).__init__()
        self.ema_model = deepcopy(model)
        self.alpha = alpha
        self.pseudo_label_weight = pseudo_label_weight

    @torch.no_grad()
    def update_weights(self, model, iter):
        keep = min(1 - 1 / (iter + 1), self.alpha)
        for own, other in zip(self.ema_model.parameters(), model.parameters()):
            own.mul_(keep).add_(other.detach() * (1 - keep))

    @torch.no_grad()
    def forward(self, target_img):
        logits, _ = self.ema_model(target_img)
        probability, label = torch.softmax(logits, 1).max(1)
        return label, probability
"""

CLASSIFIER = """
from torch import nn


class ImageClassifier(nn.Module):
    def __init__(self, backbone, num_classes, bottleneck_dim=8, pool_layer=None, finetune=True):
        super(ImageClassifier, self).__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.pool_layer = pool if pool_layer is None else pool_layer
        self.bottleneck = nn.Sequential(
            nn.Linear(backbone.out_features, bottleneck_dim), nn.BatchNorm1d(bottleneck_dim), nn.ReLU()
        )
        self.head = nn.Linear(bottleneck_dim, num_classes)

    def forward(self, x):
        f = self.bottleneck(self.pool_layer(self.backbone(x)))
        predictions = self.head(f)
        return (predictions, f) if self.training else predictions

    def get_parameters(self):
        return [{"params": part.parameters(), "lr": 0.05} for part in (self.backbone, self.bottleneck, self.head)]
"""

UTILS = """
import torch
from torch import nn

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class Block(nn.Module):
    def __init__(self, width, bottleneck):
        super(Block, self).__init__()
        self.conv1 = nn.Conv2d(width, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, width, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.drop(torch.relu(self.bn1(self.conv1(x))))
        return x + (self.conv3(y) if hasattr(self, "conv3") else y)


class Backbone(nn.Module):
    def __init__(self, blocks, bottleneck, width=6):
        super(Backbone, self).__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        for number, count in enumerate(blocks, 1):
            stage = nn.Sequential(*[Block(width, bottleneck) for _ in range(count)])
            setattr(self, "layer{}".format(number), stage)
        self.out_features = width

    def forward(self, x):
        x = self.conv1(x)
        for number in range(1, 5):
            x = getattr(self, "layer{}".format(number))(x)
        return x


def get_model(model_name, pretrain=True):
    assert not pretrain, "nothing is downloaded in tests"
    if model_name not in BLOCKS:
        raise RuntimeError("Unknown model ({})".format(model_name))
    return Backbone(BLOCKS[model_name], model_name == "resnet50")


def validate(loader, model):
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float().mean().item() for x, y in loader]
    return 100 * sum(hits) / len(hits)
"""

SCRIPT = """
import argparse
import json
import os.path as osp
import random
import shutil
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.append('../')
from common.utils.logger import CompleteLogger
from common.utils.sam import SAM
from dalib.adaptation.cdan import ImageClassifier
from dalib.modules.teacher import EMATeacher

sys.path.append('.')
import utils


class Forever:
    def __init__(self, loader):
        self.loader = loader
        self.iter = iter(loader)

    def __next__(self):
        try:
            return next(self.iter)
        except StopIteration:
            self.iter = iter(self.loader)
            return next(self.iter)


def images(domain, classes):
    generator = torch.Generator().manual_seed(domain)
    y = torch.arange(24) % classes
    x = 0.3 * torch.randn(24, 3, 6, 6, generator=generator)
    x[:, 0] += (y.float() / classes)[:, None, None]
    return TensorDataset(x + 0.1 * domain, y)


def main(args):
    logger = CompleteLogger(args.log, args.phase)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    source, target = images(0, args.classes), images(1, args.classes)
    loaders = [DataLoader(d, batch_size=4, shuffle=True, drop_last=True) for d in (source, target)]
    test_loader = DataLoader(target, batch_size=12)
    iters = [Forever(loader) for loader in loaders]
    classifier = ImageClassifier(utils.get_model(args.arch, pretrain=False), args.classes).to(args.device)
    optimizer = SAM(classifier.get_parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
    teacher = EMATeacher(classifier, alpha=0.9, pseudo_label_weight=None).to(args.device)
    if args.phase != 'train':
        classifier.load_state_dict(torch.load(logger.get_checkpoint_path('best')))
        print(' * Acc@1', utils.validate(test_loader, classifier))
        return
    best, losses = -1.0, []
    for epoch in range(args.epochs):
        losses += train(iters[0], iters[1], classifier, teacher, optimizer, epoch, args)
        acc = utils.validate(test_loader, classifier)
        torch.save(classifier.state_dict(), logger.get_checkpoint_path('latest'))
        if acc > best and epoch != args.spoil:
            shutil.copy(logger.get_checkpoint_path('latest'), logger.get_checkpoint_path('best'))
        best = max(acc, best)
    print('test_acc1 =', best)
    with open(osp.join(args.log, 'end.json'), 'w') as file:
        drawn = [random.random(), float(np.random.rand()), torch.rand(1).item()]
        json.dump({'losses': losses, 'drawn': drawn}, file)
    logger.close()


def train(source, target, model, teacher, optimizer, epoch, args):
    model.train()
    losses = []
    for i in range(args.iters):
        x_s, labels_s = next(source)
        x_t, _ = next(target)
        x_s, x_t, labels_s = x_s.to(device), x_t.to(device), labels_s.to(device)
        masked = x_t * (torch.rand_like(x_t[:, :1]) > 0.5).float()
        optimizer.zero_grad()
        teacher.update_weights(model, epoch * args.iters + i)
        pseudo, _ = teacher(x_t)

        x = torch.cat((x_s, x_t), dim=0)
        y, f = model(x)
        y_s, y_t = y.chunk(2, dim=0)
        loss = F.cross_entropy(y_s, labels_s) + F.cross_entropy(model(masked)[0], pseudo)
        loss.backward()
        losses.append(loss.item())
        optimizer.first_step(zero_grad=True)

        y, f = model(x)
        y_s, y_t = y.chunk(2, dim=0)
        f_s, f_t = f.chunk(2, dim=0)
        apart = 0.1 * (f_s.mean(0) - f_t.mean(0)).pow(2).sum()
        loss = F.cross_entropy(y_s, labels_s) + F.cross_entropy(model(masked)[0], pseudo) + apart
        losses.append(loss.item())
        loss.backward()
        optimizer.second_step(zero_grad=True)
    return losses


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('-a', '--arch', default='resnet18')
    parser.add_argument('--classes', default=3, type=int)
    parser.add_argument('--epochs', default=2, type=int)
    parser.add_argument('-i', '--iters', default=3, type=int)
    parser.add_argument('--seed', default=0, type=int)
    parser.add_argument('--log', default='log')
    parser.add_argument('--phase', default='train')
    parser.add_argument('--spoil', default=-1, type=int, help='epoch that is never the best')
    args = parser.parse_args()
    device = torch.device('cpu')
    args.device = device
    main(args)
"""

FILES: Dict[str, str] = {
    "common/__init__.py": "",
    "common/utils/__init__.py": "",
    "common/utils/sam.py": SAM,
    "common/utils/logger.py": LOGGER,
    "dalib/__init__.py": "",
    "dalib/modules/__init__.py": "",
    "dalib/modules/teacher.py": HOST_EMA,
    "dalib/adaptation/__init__.py": "",
    "dalib/adaptation/cdan.py": CLASSIFIER,
    "examples/utils.py": UTILS,
    "examples/cdan_mcc_sdat_masking.py": SCRIPT,
}


def write_host(folder: Path, changes: Optional[Dict[str, Dict[str, str]]] = None) -> Path:
    """Write the host to ``folder``; ``changes`` replaces text, by file."""
    for name, text in FILES.items():
        for old, new in (changes or {}).get(name, {}).items():
            assert old in text
            text = text.replace(old, new)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
