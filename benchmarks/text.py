"""Pictures from captions of held-out combinations: do they have the tone and the shape that the caption says?

    scoresde train experiment=openmoji_text
    python benchmarks/text.py runs/openmoji_text --scales 0 1 2 3 --picture docs/openmoji_text.png

The run is trained on captions such as "woman cook dark skin tone". Combinations of a subject and a skin tone are held
out (`split_by=[tone, subject]`): each subject and each tone is in the training data, these pairs are not. For every
held-out caption, pictures are drawn with UniPC-3 in 20 steps at each scale of classifier-free guidance, from the same
seeds. The second model of the guidance is unconditional, or, after "tone:", has the caption without the words of the
tone ("woman cook"; `negative` of `ss.guidance.ClassifierFree`), so that only the tone is emphasised. The table has

- tone: the share of pictures in which a classifier of the tone sees the tone of the caption (chance 20%), and Wilson's
  95% interval. The first row is its accuracy on the real held-out pictures. There are two classifiers, trained on real
  pictures: that of `features=openmoji_tone`, whose training pictures are 90% of all and so include most held-out ones,
  and a stricter one, trained on the training split of the run, which has not seen the combinations.
- nearer: a picture is compared with the real picture of its caption and with that of another held-out caption, by the
  Euclidean distance of pixels; the share of pairs in which its own is nearer (chance 50%; a tie counts half). The
  interval is 1.96 standard errors over captions.
- nearest: the share of pictures whose own real picture is the nearest of all held-out pictures, and Wilson's interval.

With several pictures of a caption, the first interval takes them as independent.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from samplers import machine
from torch import Tensor

import scoresde as ss
from scoresde import build, plots, run_config
from scoresde.cli import config_directory
from scoresde.evaluation.trained_classifier import TrainedClassifier
from scoresde.metrics.intervals import Interval, wilson
from scoresde.process_settings import tune_process

Z = 1.96
STEPS, SPAN = 20, (0, 255)
TONE = re.compile(r" (?:medium-)?(?:light|medium|dark) skin tone")
CAPTIONS = (
    "firefighter dark skin tone",
    "firefighter light skin tone",
    "man cook medium-light skin tone",  # from here on, the combinations are held out
    "woman artist medium skin tone",
    "man scientist medium skin tone",
    "woman guard dark skin tone",
    "ninja medium skin tone",
    "man elf medium-dark skin tone",
)


def real(run: ss.Run, split: str) -> Any:
    """Return the pictures of a split of the run's data with their tones in place of their captions' tokens."""
    node = {**run_config.plain(run.config.data)[split], "labels": "tone", "text": None}
    return build.instantiate(node)


def classifiers(run: ss.Run, split: str) -> list[TrainedClassifier]:
    """Return the two classifiers of the tone, see above; they are trained at their first use."""
    settings = run_config.plain(OmegaConf.load(config_directory() / "features" / "openmoji_tone.yaml"))
    known = build.instantiate(settings)
    training = {name: settings[name] for name in ("epochs", "batch_size", "lr", "width", "features", "seed")}
    path = Path(settings["path"]).with_name("openmoji_tone_combinations.safetensors")
    return [known, TrainedClassifier(path, real(run, "train"), real(run, split), SPAN, **training)]


def draw(
    run: ss.Run, captions: list[str], scale: float, columns: int, only_tone: bool = False, batch: int = 128
) -> Tensor:
    """Draw `columns` pictures of each caption, caption by caption, in grey levels; picture i from seed i."""
    if run.text is None:
        raise ValueError("the run must be trained with captions: scoresde train experiment=openmoji_text")
    cond = repeated(run.text(captions), columns)
    plain = repeated(run.text([TONE.sub("", caption) for caption in captions]), columns)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.UniPC(3, "bh2"), steps=STEPS, denoise_final=False)
    parts = []
    for i in range(0, len(captions) * columns, batch):
        rows = range(i, min(i + batch, len(captions) * columns))
        part, other = (
            {name: values[rows.start : rows.stop] for name, values in either.items()} for either in (cond, plain)
        )
        negative = other if only_tone else None
        model = (
            ss.guidance.ClassifierFree(run.model, part, scale, negative=negative) if scale else run.model.given(part)
        )
        parts.append(sampler(model, shape=(len(rows), *run.config.data.shape), seeds=rows).x)
    return run.transform.inverse(torch.cat(parts)).clamp(*SPAN)


def repeated(cond: dict[str, Tensor], columns: int) -> dict[str, Tensor]:
    """Return the conditions with `columns` rows for each."""
    return {name: part.repeat_interleave(columns, 0) for name, part in cond.items()}


def agreement(classifier: TrainedClassifier, pictures: Tensor, tones: Tensor) -> Interval:
    """Return the share of pictures in which the classifier sees the tone that it should, with Wilson's interval."""
    predicted = classifier(pictures, SPAN).logits.argmax(dim=1)
    return wilson(int((predicted == tones).sum()), len(tones), Z)


def nearness(pictures: Tensor, truth: Tensor) -> tuple[Interval, Interval]:
    """Return how often the own real picture is nearer than another one, and how often it is the nearest of all.

    Args:
        pictures: drawn pictures (N K, ...), K for each of N captions.
        truth: the real pictures (N, ...) of the captions.
    """
    count, columns = len(truth), len(pictures) // len(truth)
    distances = torch.cdist(pictures.double().flatten(1), truth.double().flatten(1))
    own = torch.arange(count).repeat_interleave(columns)
    mine = distances.gather(1, own[:, None])
    is_other = own[:, None] != torch.arange(count)
    wins = ((distances > mine).double() + 0.5 * (distances == mine).double()) * is_other
    shares = (wins.sum(dim=1) / (count - 1)).reshape(count, columns).mean(dim=1)
    error = Z * float(shares.std() / count**0.5)
    first = int(((distances < mine) & is_other).any(dim=1).logical_not().sum())
    mean = float(shares.mean())
    return Interval(mean, mean - error, mean + error), wilson(first, len(pictures), Z)


def shown(interval: Interval) -> str:
    """Return a share and its interval in percent."""
    return f"{100 * interval.value:.1f}% ({100 * interval.low:.1f}% to {100 * interval.high:.1f}%)"


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--scales", type=float, nargs="*", default=[0.0, 1.0, 2.0, 3.0])
    parser.add_argument(
        "--tone-scales", type=float, nargs="*", default=[1.0, 2.0], help="scales of guidance by the tone"
    )
    parser.add_argument("--columns", type=int, default=1, help="pictures of each caption")
    parser.add_argument("--picture", type=Path, help="PNG file of a row of pictures for each of a few captions")
    parser.add_argument("--picture-scale", type=float, default=2.0)
    options = parser.parse_args()
    tune_process()
    run = ss.load(options.run)
    held_out, judges = real(run, options.split), classifiers(run, options.split)
    truth = torch.stack([held_out[i][0] for i in range(len(held_out))])
    print(machine("cpu"))
    print(f"{len(held_out)} pictures of the {options.split} split, {options.columns} drawn for each")
    print("| guidance | tone | tone, stricter | nearer | nearest |\n| --- | --- | --- | --- | --- |")
    row = [shown(agreement(judge, truth, held_out.labels)) for judge in judges]
    print(f"| real pictures | {' | '.join(row)} | | |")
    tones = held_out.labels.repeat_interleave(options.columns)
    guidances = [(scale, False) for scale in options.scales] + [(scale, True) for scale in options.tone_scales]
    for scale, only_tone in guidances:
        pictures = draw(run, held_out.captions, scale, options.columns, only_tone)
        columns = [*(agreement(judge, pictures, tones) for judge in judges), *nearness(pictures, truth)]
        print(f"| {'tone: ' if only_tone else ''}{scale:g} | {' | '.join(map(shown, columns))} |", flush=True)
    if options.picture is not None:
        pictures = draw(run, list(CAPTIONS), options.picture_scale, 8)
        plots.save_samples(pictures, options.picture, *SPAN, CAPTIONS, held_out.credit)


if __name__ == "__main__":
    main()
