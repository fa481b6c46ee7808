"""What the package did when this was recorded, through its public names alone.

    python tests/frozen/record.py            compare everything with record.json
    python tests/frozen/record.py --write    record anew
    python tests/frozen/record.py bert cli   only these sections or cases

Kernels differ between machines and builds of torch in the last digits, so a decision counts only
where it does not hang on them: on recording, each cut is made again of a model whose weights are
off by NOISE, and what comes out otherwise is recorded as "sensitive" and never compared.
Logits are kept to six digits and compared to LOGITS of the greatest of the model,
or to ten times that where the disturbed model says so ("within"). Logits of a model that was saved
and loaded are recorded only where they are not those of the model that was saved.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import models
import torch
import transformers
import yaml
import zoo
from standins import text_model
from structures import uneven

import hfslim

RECORD = Path(__file__).with_name("record.json")
SENSITIVE = "sensitive"
NOISE = 1e-6
LOGITS = 1e-4
FIGURES = 1e-3
"""Relative tolerance of what the verbs print."""
TRAINED = 0.03
"""That of figures after training, whose rounding errors grow with every step."""

# Cut in every way; the others, which are built alike, in the usual way only.
THOROUGH = (
    *("bert", "distilbert", "deberta-v2", "modernbert", "llama", "qwen3"),
    *("vit", "dinov2", "beit", "swin", "wav2vec2", "audio-spectrogram-transformer", "whisper"),
    *("image/resnet", "image/regnet", "image/bit", "image/convnextv2", "image/poolformer"),
    *("text/t5", "text/bart", "text/albert", "text/gpt2", "text/mixtral", "audio/wav2vec2-bert"),
)
ZOO = tuple(case for case in zoo.CASES if case not in THOROUGH)
SHORT = ("bert", "vit", "wav2vec2", "whisper", "llama", "image/resnet")
SHORT_CUTS = ("obs 0.5", "fisher 0.5", "magnitude 0.5")
CUTS: dict[str, dict[str, Any]] = {
    f"{criterion} {kept}": {"target": {"macs": kept}, "criterion": criterion}
    for criterion in ("obs", "fisher", "magnitude")
    for kept in (0.75, 0.5, 0.3)
}
CUTS |= {
    "layers": {"target": {"parameters": 0.6}, "more": ("layers",)},
    "dimensions": {
        "target": {"sparsity": {"dimensions": 0.25}},
        "criterion": "fisher",
        "only": ("dimensions",),
    },
    "uniform": {"target": {"macs": 0.8}, "uniform": True, "only": ("neurons",)},
    "sparsity, as it is": {"target": {"sparsity": 0.3}, "reconstruction": "none"},
}
USUAL = {"usual 0.5": {"target": {"macs": 0.5}}}


# What is compared.


def rounded(value: Any, digits: int = 6) -> Any:
    """Return plain values with their floats cut to a number of digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(
    old: Any, new: Any, relative: float, floats: float = 0.0, whole: int = 0, where: str = ""
) -> Iterator[str]:
    """Tell where two plain values differ; numbers may by a share and an amount."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("sensitive"):
            return
        for key in dict.fromkeys((*old, *new)):
            if key == "within" or (key == "reloaded" and old.get("logits") == SENSITIVE):
                continue
            if key not in old or key not in new:
                yield f"{where}/{key}: {'new' if key in new else 'gone'}"
                continue
            numbers = (old[key], new[key])
            if old[key] == SENSITIVE:
                continue
            if key == "logits" and all(isinstance(one, list) for one in numbers):
                if not farthest(*numbers) <= old.get("within", LOGITS):
                    yield f"{where}/{key}: {old[key]} → {new[key]}"
            else:
                yield from differences(*numbers, relative, floats, whole, f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{where}: {len(old)} → {len(new)} entries"
            return
        if old and all(isinstance(one, float) for one in old):
            # Beside the greatest score of a site, that of a unit of no use is rounding.
            floats = max(floats, relative / 10 * max(map(abs, old)))
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, relative, floats, whole, f"{where}/{number}")
    elif _number(old) and _number(new):
        slack = whole if isinstance(old, int) and isinstance(new, int) else floats
        if not abs(old - new) <= relative * max(abs(old), abs(new)) + slack:
            yield f"{where}: {old} → {new}"
    elif type(old) is not type(new) or old != new:
        yield f"{where}: {old!r} → {new!r}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def farthest(old: list[float], new: list[float]) -> float:
    """Return the greatest difference, as a share of the greatest value."""
    if len(old) != len(new):
        return math.inf
    apart = [abs(a - b) for a, b in zip(old, new, strict=True)]
    if not all(map(math.isfinite, apart)):
        return math.inf
    return max(apart, default=0.0) / max([*map(abs, old), 1e-12])


# Models and their data.


def tiny(case: str) -> transformers.PreTrainedModel:
    return zoo.tiny(case) if "/" in case else models.tiny(case)


def auto_class(case: str) -> Any:
    return zoo.auto_class(case) if "/" in case else models.auto_class(case)


def inputs_of(model: Any, examples: int, seed: int) -> dict[str, torch.Tensor]:
    """Return random inputs for a tiny model."""
    draw, config = torch.Generator().manual_seed(seed), model.config
    name = model.main_input_name
    if name == "input_ids":
        ids = torch.randint(3, 60, (examples, 16), generator=draw)
        if config.is_encoder_decoder:
            ids[:, -1] = config.get_text_config().eos_token_id
        return {name: ids, "attention_mask": torch.ones_like(ids)}
    if name == "pixel_values":
        size = getattr(getattr(config, "vision_config", config), "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.randn(examples, 3, height, width, generator=draw)}
    if name == "input_values" and hasattr(config, "num_mel_bins"):
        shape = (config.max_length, config.num_mel_bins)
    elif name == "input_values":
        shape = (1200,)
    elif hasattr(config, "num_mel_bins"):
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
    else:
        shape = (32, config.feature_projection_input_dim)
    return {name: torch.randn(examples, *shape, generator=draw)}


def data_of(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return labelled batches, with more positions than any layer has units."""
    return [
        {**inputs_of(model, 8, seed), "labels": (torch.arange(8) + seed) % 3}
        for seed in range(1, 4)
    ]


@torch.no_grad()
def logits_of(model: Any) -> list[float]:
    return model.eval()(**inputs_of(model, 2, 7)).logits.flatten().double().tolist()


@torch.no_grad()
def disturbed(model: Any) -> Any:
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=draw))
    return model


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return farthest(one["logits"], other["logits"])


# Cuts.


def kinds_of(model: Any) -> list[str]:
    found = {site.kind for site in hfslim.find_units(model)}
    return [k for k in ("heads", "neurons", "channels", "experts") if k in found] or ["layers"]


def cut(model: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    """Prune a model; return what is kept, and what the cut model says."""
    how = dict(how)
    more = how.pop("more", ())
    units = how.pop("only", None) or list(dict.fromkeys((*kinds_of(model), *more)))
    try:
        structure = hfslim.prune(
            model, data_of(model), units=units, seed=0, progress=False, **how
        ).structure
    except (ValueError, RuntimeError) as error:
        return {"refused": type(error).__name__}
    kept = structure.to_dict()
    counts = {
        kind: [sum(len(s["kept"]) for s in sites.values()), sum(s["total"] for s in sites.values())]
        for kind, sites in kept.items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "kept": " ".join(f"{kind} {a}/{b}" for kind, (a, b) in counts.items()),
        "structure": digest(kept),
        "parameters": parameters,
        "logits": logits_of(model),
    }


def reloaded(model: Any, case: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return auto_class(case).from_pretrained(folder)


def checked_cut(case: str, how: Mapping[str, Any], check: bool, reload: bool) -> dict[str, Any]:
    """Cut a model, where wanted twice, to see whether rounding alone changes what comes out."""
    model = tiny(case)
    found = cut(model, how)
    if check and "logits" in found:
        again = cut(disturbed(tiny(case)), how)
        if {**again, "logits": 0} != {**found, "logits": 0}:
            return {"sensitive": True}
        wide = [part for part in (LOGITS, 10 * LOGITS) if _apart(found, again) <= part / 2]
        if not wide:
            found["logits"] = SENSITIVE
        elif wide[0] != LOGITS:
            found["within"] = wide[0]
    if reload and found.get("logits", SENSITIVE) != SENSITIVE:
        again = logits_of(reloaded(model, case))
        if farthest(found["logits"], again) > LOGITS:
            found["reloaded"] = {"logits": again}
    return found


def model_case(case: str, check: bool, cuts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is found in a model and what becomes of it."""
    try:
        model = tiny(case)
        inputs = inputs_of(model, 2, 7)
        logits_of(model)
    except Exception as error:  # Something is not installed, or the inputs are of an unusual kind.
        if os.environ.get("HFSLIM_DEBUG"):
            raise
        return {"sensitive": True, "because": type(error).__name__}
    units = sorted((s.kind, s.path, s.size, sorted(s.fixed)) for s in hfslim.find_units(model))
    cost = hfslim.measure(model, inputs, calls=1, warmup=0).to_dict()
    result = {
        "units": digest(units),
        "refused": digest(sorted((r.kind, r.path) for r in hfslim.find_units(model).refusals)),
        "cost": {name: cost[name] for name in ("inputs", "parameters", "macs", "bytes")},
        "uneven": uneven_case(model, case),
        "cuts": {
            name: checked_cut(case, how, check, reload=name in ("obs 0.5", "usual 0.5"))
            for name, how in cuts.items()
        },
    }
    return rounded(result)


def uneven_case(model: Any, case: str) -> dict[str, Any]:
    """Gate, cut and reload at a structure that no score chose."""
    try:
        structure = uneven(model)
        with hfslim.gated(model, structure):
            gated = logits_of(model)
        hfslim.shrink(model, structure)
    except (ValueError, RuntimeError) as error:
        return {"refused": type(error).__name__}
    cost = hfslim.measure(model, inputs_of(model, 2, 7), calls=1, warmup=0).to_dict()
    found = {"logits": gated, "cut": logits_of(model), "reloaded": logits_of(reloaded(model, case))}
    result = {
        "structure": digest(structure.to_dict()),
        "cost": {name: cost[name] for name in ("parameters", "macs", "bytes")},
        "logits": gated,
    }
    # Of the three only what differs is recorded.
    return result | {k: {"logits": v} for k, v in found.items() if farthest(gated, v) > LOGITS}


# The command line.

_CHANGING = re.compile(
    r"latency|speedup|^low$|^high$|machine|runtime|per_second|seconds|throughput|threads|device"
    r"|versions?$|date|hardware|system|total_flos"
)


def lasting(value: Any) -> Any:
    """Return plain values without times, machines and versions."""
    if isinstance(value, dict):
        return {k: lasting(one) for k, one in value.items() if not _CHANGING.search(k)}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def command(*arguments: str) -> Any:
    """Run `python -m hfslim` in this process, and return the JSON that it prints."""
    out, given = io.StringIO(), sys.argv
    sys.argv = ["hfslim", *arguments, "--json"]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                runpy.run_module("hfslim", run_name="__main__")
            except SystemExit as ended:
                code = ended.code or 0
    finally:
        sys.argv = given
    if code:
        raise RuntimeError(f"hfslim {' '.join(arguments)} ended with {code}:\n{told.getvalue()}")
    return lasting(json.loads(out.getvalue()))


@contextlib.contextmanager
def folder_of_work() -> Iterator[Path]:
    """Work in a folder with two models and data, under names that go into what is printed."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        text_model(folder / "model")
        text_model(folder / "other", seed=1)
        words = ("a", "film", "plot", "good", "gripping", "dull", "bad", "the")
        draw = random.Random(0)
        for file, rows in (("train", 96), ("held", 24)):
            with (folder / f"{file}.csv").open("w", newline="") as target:
                write = csv.writer(target).writerow
                write(("text", "label"))
                for i in range(rows):
                    word, label = (("good", "positive"), ("bad", "negative"))[i % 2]
                    write((" ".join([word, *draw.choices(words, k=8 + i % 4)]), label))
        yield folder


DATA = ("--data", "train.csv", "--data", "validation_file=held.csv", "--data", "max_seq_length=16")
QUICK = ("--calls", "1", "--batch-size", "2")
VERBS: dict[str, Callable[[], Any]] = {
    "measure": lambda: command("measure", "model", *QUICK, "--length", "16"),
    "families": lambda: families(),
    "inspect": lambda: command("inspect", "model"),
    "inspect with data": lambda: command(
        *("inspect", "model", *DATA, "--units", "heads", "--units", "layers"),
        *("--by-class", "--similarity", "--against", "other"),
    ),
    "compare": lambda: command("compare", "model", "other", *DATA, *QUICK),
    "prune": lambda: command("prune", "model", "--target", "macs=0.6", *DATA, "--output", "small"),
    "prune by magnitude": lambda: command(
        *("prune", "model", "--target", "sparsity.neurons=0.4", *DATA, "--output", "narrow"),
        *("--units", "neurons", "--criterion", "magnitude"),
    ),
    "measure what was pruned": lambda: command("measure", "narrow", *QUICK, "--length", "16"),
    "card": lambda: command("card", "narrow"),
    "report": lambda: command("report", "narrow"),
}
SHORT_VERBS = ("measure", "families")


def families() -> dict[str, str]:
    rows = command("families")["families"]
    return {f"{row['task']}/{row['model_type']}": digest(row) for row in rows}


def verbs(names: Any = VERBS) -> dict[str, Any]:
    """Return what the verbs print."""
    with folder_of_work():
        return {name: rounded(VERBS[name]()) for name in names}


RECIPE = {
    "task": "image-classification",
    "model_config": {
        "model_type": "vit",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "data": {"dataset_name": "digits", "max_train_samples": 640, "max_eval_samples": 200},
    "metric": "accuracy",
    "output_dir": "out",
    "training": {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100,
        "logging_steps": 20,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    },
    "stages": [
        {"transfer": {"num_train_epochs": 3, "learning_rate": 3e-3}},
        {"prune": {"target": {"macs": 0.5}, "units": ["heads", "neurons"], "max_examples": 128}},
        {"recover": {"num_train_epochs": 1, "learning_rate": 1e-3, "temperature": 2, "alpha": 0.9}},
        {"measure": {"batch_sizes": [1]}},
    ],
}


def recipe_figures() -> dict[str, Any]:
    """Return the report of a recipe that trains, cuts and recovers, without its finest detail."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        command("run", "recipe.yaml")
        report = lasting(json.loads(Path("out/report.json").read_text()))
        stages = json.loads(Path("out/manifest.json").read_text())["stages"]
    report["units"] = [
        {k: u[k] for k in ("stage", "kind", "path", "total")} for u in report["units"]
    ]
    report["stages of the manifest"] = [
        {key: stage[key] for key in ("name", "folder", "finished", "steps")} for stage in stages
    ]
    return rounded(report)


# The whole.


def record(chosen: list[str], check: bool) -> Iterator[tuple[str, str, Any]]:
    """Yield section, name and figures of everything, or of the sections and cases asked for."""
    for section, cases, cuts in (("families", THOROUGH, CUTS), ("zoo", ZOO, USUAL)):
        for case in cases:
            if not chosen or {section, case} & set(chosen):
                yield section, case, model_case(case, check, cuts)
    if not chosen or "recipe" in chosen:
        for name, value in recipe_figures().items():
            yield "recipe", name, value
    if not chosen or "cli" in chosen:
        for name, value in verbs().items():
            yield "cli", name, value


def compared(section: str, old: Any, new: Any) -> list[str]:
    """Return the differences in a section or a part of one."""
    if section == "recipe":
        return list(differences(old, new, TRAINED, floats=TRAINED, whole=3, where=section))
    return list(differences(old, new, FIGURES, floats=1e-12, where=section))


def load() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def save(kept: Mapping[str, Mapping[str, Any]]) -> None:
    sections = (
        f' "{section}": {{\n'
        + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in part.items())
        + "\n }"
        for section, part in kept.items()
    )
    RECORD.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


def main() -> int:
    """Record, or compare with the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("chosen", nargs="*", help="sections (families, zoo, recipe, cli) or cases")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    kept: dict[str, dict[str, Any]] = load() if RECORD.exists() else {}
    count, start = 0, time.monotonic()
    for section, name, found in record(options.chosen, options.write):
        if options.write:
            kept.setdefault(section, {})[name] = found
            save(kept)
        else:
            told = compared(section, {name: kept[section].get(name)}, {name: found})
            count += len(told)
            print(*told, sep="\n", end="\n" if told else "")
        print(f"{time.monotonic() - start:.0f} s: {section}/{name}", file=sys.stderr)
    if not options.write:
        print(f"{count} differences")
    return bool(count)


if __name__ == "__main__":
    raise SystemExit(main())
