"""Slow float64 oracles of the distillation losses, written from the definitions: plain loops over plain numpy.

Logits and features are ``(N, C, P)`` (``P = 1`` for classification), weights ``(N, P)`` or ``None``.
"""

import math

import numpy as np
import torch


def softmax(values, weights=None):
    weights = [1.0] * len(values) if weights is None else weights
    top = max(value for value, weight in zip(values, weights) if weight > 0)
    scores = [weight * math.exp(value - top) if weight > 0 else 0.0 for value, weight in zip(values, weights)]
    return [score / sum(scores) for score in scores]


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)


def positions(array, weights):
    """Yield (vector of channels, weight) of every position that counts."""
    for n in range(array.shape[0]):
        for i in range(array.shape[2]):
            weight = 1.0 if weights is None else float(weights[n, i])
            if weight > 0:
                yield n, i, weight


def weighted_mean(pairs):
    pairs = list(pairs)
    total = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / total if total else 0.0


def kl(student, teacher, weights=None, temperature=1.0):
    def at(n, i):
        return divergence(softmax(teacher[n, :, i] / temperature), softmax(student[n, :, i] / temperature))

    return temperature**2 * weighted_mean((w, at(n, i)) for n, i, w in positions(student, weights))


def channel_wise(student, teacher, weights=None, temperature=1.0):
    terms = []
    for n in range(student.shape[0]):
        w = np.ones(student.shape[2]) if weights is None else weights[n]
        if max(w) == 0:
            continue
        for c in range(student.shape[1]):
            p, q = softmax(teacher[n, c] / temperature, w), softmax(student[n, c] / temperature, w)
            terms.append((max(w), divergence(p, q)))
    return temperature**2 * weighted_mean(terms)


def decoupled(student, teacher, weights=None, temperature=1.0, alpha=1.0, beta=8.0, labels=None):
    def at(n, i):
        s, t = student[n, :, i] / temperature, teacher[n, :, i] / temperature
        k = int(np.argmax(t)) if labels is None else int(labels[n, i])
        p, q = softmax(t), softmax(s)
        rest_p, rest_q = sum(np.delete(p, k)), sum(np.delete(q, k))
        target = divergence([p[k], rest_p], [q[k], rest_q])
        return alpha * target + beta * divergence(softmax(np.delete(t, k)), softmax(np.delete(s, k)))

    return temperature**2 * weighted_mean((w, at(n, i)) for n, i, w in positions(student, weights))


def pearson(x, y, weights):
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    covariance = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y))
    variance_x = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x))
    variance_y = sum(w * (b - mean_y) ** 2 for w, b in zip(weights, y))
    return covariance / math.sqrt(variance_x * variance_y)


def dist(student, teacher, weights=None, temperature=1.0, inter=1.0, intra=1.0):
    rows = [
        (w, softmax(student[n, :, i] / temperature), softmax(teacher[n, :, i] / temperature))
        for n, i, w in positions(student, weights)
    ]
    share = [w for w, _, _ in rows]
    between = weighted_mean((w, 1 - pearson(s, t, [1.0] * len(s))) for w, s, t in rows)
    within = [
        1 - pearson([s[c] for _, s, _ in rows], [t[c] for _, _, t in rows], share) for c in range(student.shape[1])
    ]
    return temperature**2 * (inter * between + intra * float(np.mean(within)))


def features(student, teacher, weights=None):
    def at(n, i):
        return float(np.mean([(a - b) ** 2 for a, b in zip(student[n, :, i], teacher[n, :, i])]))

    return weighted_mean((w, at(n, i)) for n, i, w in positions(student, weights))


def attention(student, teacher, weights=None, power=2.0):
    terms = []
    for n in range(student.shape[0]):
        w = np.ones(student.shape[2]) if weights is None else weights[n]
        if max(w) == 0:
            continue
        maps = []
        for x in (student[n], teacher[n]):
            energy = [sum(abs(v) ** power for v in x[:, i]) for i in range(x.shape[1])]
            norm = math.sqrt(sum(a * e * e for a, e in zip(w, energy)))
            maps.append([e / norm for e in energy])
        terms.append((max(w), sum(a * (s - t) ** 2 for a, s, t in zip(w, *maps))))
    return weighted_mean(terms)


# The same once more as plain torch compositions in float64: what their gradients are is autograd's business.


def differentiable(name, student, teacher, weights=None, temperature=1.0, alpha=1.0, beta=8.0, power=2.0):
    """Return a loss of float64 tensors ``(N, C, P)`` with its graph; weights are ``(N, P)`` or ``None``."""
    if weights is None:
        weights = torch.ones(student.shape[0], student.shape[2], dtype=torch.float64)
    total, rows = weights.sum(), weights.amax(1, keepdim=True)
    s, t, ignored = student / temperature, teacher / temperature, (weights == 0).unsqueeze(1)

    def mean(values):  # (N, P)
        return (weights * values).sum() / total

    if name == "kl":
        return temperature**2 * mean(_divergence(s, t, 1))
    if name == "channel_wise":
        log = weights.clamp(min=1e-300).log().unsqueeze(1)
        s, t = ((x + log).masked_fill(ignored, -1e300) for x in (s, t))
        return temperature**2 * (rows * _divergence(s, t, 2)).sum() / (rows.sum() * s.shape[1])
    if name == "decoupled":
        k = torch.nn.functional.one_hot(t.argmax(1), t.shape[1]).transpose(1, 2).bool()
        (s_two, s_rest), (t_two, t_rest) = (_target_and_rest(x, k) for x in (s, t))
        return temperature**2 * mean(alpha * _divergence(s_two, t_two, 1) + beta * _divergence(s_rest, t_rest, 1))
    if name == "dist":
        q, p = s.softmax(1), t.softmax(1)
        even = torch.ones_like(q[:, :, :1]) / q.shape[1]
        across = _uncorrelated(q, p, even, 1)
        share = (weights / total).reshape(1, 1, -1)
        columns = (x.transpose(0, 1).reshape(1, x.shape[1], -1) for x in (q, p))
        return temperature**2 * (mean(across) + _uncorrelated(*columns, share, 2).mean())
    if name == "features":
        return mean((student - teacher).pow(2).mean(1))
    if name == "attention":
        maps = []
        for x in (student, teacher):
            x = x.abs().masked_fill(ignored, 0)
            largest = x.detach().amax((1, 2), keepdim=True)
            energy = (x / torch.where(largest == 0, torch.ones_like(largest), largest)).pow(power).sum(1)
            norm = (weights * energy.pow(2)).sum(1, keepdim=True)
            maps.append(energy / torch.where(norm == 0, torch.ones_like(norm), norm).sqrt())
        apart = (weights * (maps[0] - maps[1]).pow(2)).sum(1, keepdim=True)
        return (rows * apart).sum() / rows.sum()
    raise ValueError(name)


def _divergence(student, teacher, dim):
    log_q, log_p = student.log_softmax(dim), teacher.log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim)


def _target_and_rest(x, target):
    rest = x.masked_fill(target, -1e300)
    of_target = x.masked_fill(~target, 0).sum(1, keepdim=True)
    return torch.cat([of_target, rest.logsumexp(1, keepdim=True)], 1), rest


def _uncorrelated(x, y, share, dim):
    """Return 1 minus the correlation, as ``dist_distillation`` defines it where either is constant."""
    centred, sizes, inverse, constant = [], [], [], []
    for value in (x, y):
        mean = (share * value).sum(dim, keepdim=True)
        value = (value - mean).masked_fill(share == 0, 0)
        largest = value.detach().abs().amax(dim, keepdim=True).clamp(min=1e-150)  # whose square may underflow
        value = value / largest
        square = (share * value.pow(2)).sum(dim)
        sizes.append((mean.detach() / largest).squeeze(dim))
        constant.append((square.sqrt() <= 1e-6 * sizes[-1]) | (square == 0))
        inverse.append(torch.where(constant[-1], torch.ones_like(square), square).rsqrt())
        centred.append(value)
    covariance = (share * centred[0] * centred[1]).sum(dim) * inverse[1]
    pull = covariance / sizes[0].clamp(min=1e-150)
    rho = torch.where(constant[0], pull - pull.detach(), covariance * inverse[0])
    if dim == 1 and x.shape[1] == 2:
        rho = rho.detach()
    return (~constant[1]).double() - rho.masked_fill(constant[1], 0)
