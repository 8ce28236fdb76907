"""What losses and pictures of a run say about its health, in sentences with a cure."""

import math
import statistics
from collections.abc import Sequence

SPIKE = 2.0  # times the median of the records before
STUCK = 0.99  # of the loss at the start: above it nothing has been learned
FIRST, RECENT = 5, 20  # records that stand for the start and for now
# Records at the full learning rate before a loss is called flat. Healthy runs on CIFAR-10 were at
# 0.99 of their start 20 records after it and at 0.94 after 40: they begin at the linear guess,
# which is good already.
JUDGED = 40
LAG = 1.1  # times the loss of the raw weights: the average is too slow
# Times the loss with the labels: above it the null label is foreign to the network. A late sign:
# after one epoch of CIFAR-10 it was 1.005 with a tenth of the labels dropped, 1.009 with none.
NULL = 1.05
RISE = 1.1  # times the best validation loss, while the training loss does not rise
GRADIENT = 5.0  # times the median gradient norm of the records before
FLAT = 0.02  # standard deviation of a picture's pixels in [-1, 1], mean of its channels
DRIFT = 0.3  # difference of the means of a colour channel in [-1, 1]
COLOURS = ("red", "green", "blue")


def lowest(records: Sequence[dict], key: str) -> dict:
    """The record with the lowest value of this key; NaN, as of a diverged run, is the highest."""
    return min(records, key=lambda record: (math.isnan(record[key]), record[key]))


def records_at_full_rate(train: Sequence[dict]) -> int:
    """Since the learning rate reached its highest value: the end of the warm-up."""
    rates = [record["learning_rate"] for record in train]
    return len(rates) - 1 - rates.index(max(rates)) if rates else 0


def loss_findings(train: Sequence[dict]) -> list[str]:
    """What the last record says: a loss that jumps, or, once, that never left its start value."""
    found = []
    *before, loss = (record["loss"] for record in train[-RECENT - 1 :])
    if len(before) >= RECENT // 2 and loss > SPIKE * (usual := statistics.median(before)):
        found.append(
            f"loss {loss:.4g} is {loss / usual:.1f} times what was usual before; if it stays "
            "there, continue from an earlier checkpoint with a lower train.learning_rate"
        )
    start, now = (statistics.fmean(record["loss"] for record in part)
                  for part in (train[:FIRST], train[-RECENT:]))
    if now > STUCK * start and records_at_full_rate(train) == JUDGED:
        found.append(
            f"loss {now:.4g} is still where it began ({start:.4g}): nothing is learned; look at "
            "the originals in samples/ and at train.learning_rate"
        )
    return found


def quarter_words(train: Sequence[dict]) -> list[str]:
    """How the loss of each noise level goes: "normal", "stuck", "diverging" or "too early".

    The last RECENT records count, against the first ones and against the best stretch so far: stuck
    is more than STUCK of the start, diverging more than SPIKE times the best.
    """
    words = []
    for quarter in range(len(train[-1]["loss_quarters"]) if train else 0):
        losses = [record["loss_quarters"][quarter] for record in train]
        losses = [loss for loss in losses if loss is not None]
        if min(records_at_full_rate(train), len(losses)) < JUDGED:
            words.append("too early")
            continue
        stretches = [statistics.fmean(losses[i : i + RECENT])
                     for i in range(0, len(losses) - RECENT + 1, RECENT)]
        now, start = statistics.fmean(losses[-RECENT:]), statistics.fmean(losses[:FIRST])
        words.append("diverging" if now > SPIKE * min(stretches)
                     else "stuck" if now > STUCK * start else "normal")
    return words


def verdict(warnings: int) -> str:
    """On the run at a validation, by the number of warnings since the one before."""
    if not warnings:
        return "nothing looks wrong"
    return f"{warnings} warning{'s' * (warnings > 1)} since the last validation"


def validation_findings(train: Sequence[dict], validation: Sequence[dict]) -> list[str]:
    """What the records up to a validation say.

    Looked for: an average that lags, a null label that is not trained, overfitting, growing
    gradients.
    """
    found = []
    last = validation[-1]
    if last["loss_ema"] > LAG * last["loss"]:
        found.append(
            f"the EMA weights lag behind the raw ones (validation loss {last['loss_ema']:.4g} "
            f"against {last['loss']:.4g}); if that lasts, lower train.ema_rampup_ratio"
        )
    if last.get("loss_null", 0) > NULL * last["loss_ema"]:
        found.append(
            f"the null label is not trained (validation loss {last['loss_null']:.4g} with it, "
            f"{last['loss_ema']:.4g} with the labels), and guidance draws on it; raise "
            "train.class_dropout_prob"
        )
    best = lowest(validation, "loss")
    recent = [record["loss"] for record in train[-RECENT:]]
    at_best = [record["loss"] for record in train if record["step"] <= best["step"]][-RECENT:]
    if recent and at_best and last["loss"] > RISE * best["loss"]:
        if statistics.fmean(recent) <= statistics.fmean(at_best):
            found.append(
                f"validation loss rose from {best['loss']:.4g} (step {best['step']}) to "
                f"{last['loss']:.4g} while training loss did not: the model memorises. best.pt "
                "keeps the best weights; model.dropout or more pictures help"
            )
    norms = [record["grad_norm"] for record in train]
    if len(norms) >= 3 * RECENT:
        usual = statistics.median(norms[:-RECENT])
        if statistics.median(norms[-RECENT:]) > GRADIENT * usual:
            found.append(
                f"gradients have grown to {statistics.median(norms[-RECENT:]):.3g} from "
                f"{usual:.3g}; lower train.learning_rate"
            )
    return found


def picture_findings(images, data) -> list[str]:
    """What samples (N, 3, H, W) in [-1, 1] show beside data (M, 3, H, W): flatness, a tint."""
    found = []
    flat, flat_data = (x.flatten(2).std(2).mean(1) < FLAT for x in (images, data))
    if flat.float().mean() > flat_data.float().mean():
        found.append(
            f"{int(flat.sum())} of {len(images)} pictures are of a single colour; if that lasts, "
            "try train.precision fp32 and sample.precision fp32"
        )
    means = [x.mean((0, 2, 3)).tolist() for x in (images, data)]
    for colour, ours, theirs in zip(COLOURS, *means):
        if abs(ours - theirs) > DRIFT:
            found.append(
                f"pictures have {colour} at {ours:+.2f} on average, the data at {theirs:+.2f}: a "
                "tint that should fade with training"
            )
    return found
