"""Slow float64 oracles of the distillation losses, written from the definitions: plain loops over plain numpy.

Logits and features are ``(N, C, P)`` (``P = 1`` for classification), weights ``(N, P)`` or ``None``.
"""

import math

import numpy as np


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
