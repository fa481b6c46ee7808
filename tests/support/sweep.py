"""Prove what can be cut, type by type: gated ≡ shrunk ≡ reloaded, and every gate has an effect.

    python tests/support/sweep.py                  all types of the three auto classes
    python tests/support/sweep.py bert image/vit   some, with tracebacks
    python tests/support/sweep.py my_module:build  a family of one's own, built by a function
    python tests/support/sweep.py --write          all, and bring the coverage table up to date
    python tests/support/sweep.py --page           only write docs/families.md anew from that table

Each type runs in a process of its own with a time limit, so that one that hangs stops no other.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from places import ROOT
from safetensors import safe_open
from structures import uneven
from torch import nn
from transformers import PreTrainedModel

import hfslim
from hfslim.anatomy.coverage import COLUMNS, SIGNS, Coverage, coverage, measured
from hfslim.anatomy.discovery import find_units
from hfslim.anatomy.inputs import example_inputs
from hfslim.anatomy.structure import KINDS, Kind, Structure
from hfslim.anatomy.units import Site, Units
from hfslim.pruning.gates.gates import gated
from hfslim.pruning.search.plain_config import Stream, stream_of
from hfslim.pruning.surgery.surgery import shrink

TOLERANCE = 1e-5
EFFECT = 1e-6
LENGTHS = {"input_ids": 16, "inputs": 16, "input_values": 4000, "input_features": 64}


INTRODUCTION = """# Model families

The kinds of unit that can be removed from each type of classifier. A sweep over all types of the
three auto classes of transformers {version} builds each type tiny and cuts it kind by kind, under
eager and sdpa attention. `yes`: gated, cut and reloaded outputs are equal, after a second cut too.
`refused`: not offered, or taken back, with the reason; `no`: it fails with an error. `–`: the type
has no such part. Empty: not tried. Nothing is cut wrongly without an error: a cut that does not
equal its gates is taken back, and a warning names the cuts whose effect is too small to compare.

"Plain reload" names the kinds of unit whose uniform cut (the same number everywhere) the type's own
config describes, so that the result loads without hfslim; all other results load after
`import hfslim`, or with `trust_remote_code=True`.

Types with exact cuts, among those that can be built and have such parts: {shares}.

For a type that is not here, or a model of your own, see [how to add a family](add_a_family.md).
`python tests/support/sweep.py --write` writes this page.
"""


@dataclass(frozen=True)
class Row:
    """What one type does under one attention when one kind of unit is cut.

    Attributes:
        outcome: `exact`, `refused`, `absent` (nothing of the kind was found), `wrong` (an unequal
            output without an error), `error` or `missing` (a package that the type needs).
        difference: Largest difference of logits seen, relative to the largest logit above 1.
    """

    case: str
    attention: str
    kind: str
    outcome: str
    units: int = 0
    difference: float = 0.0
    reason: str = ""
    plain: bool = False


class Wrong(AssertionError):
    """An output that is not what it has to be."""


def sweep(case: str, kinds: Sequence[Kind] = KINDS) -> Iterator[Row]:
    """Yield the outcomes of one type, kind by kind and for all kinds at once."""
    for attention in ("eager", "sdpa"):
        try:
            model = zoo.tiny(case, attention)
        except ImportError as error:
            yield Row(case, attention, "build", "missing", reason=_short(error))
            return
        except ValueError as error:
            if attention == "eager" or "does not support" not in str(error):
                yield Row(case, attention, "build", "error", reason=_short(error))
            continue
        units = find_units(model, "dimensions" in kinds)
        found = [kind for kind in kinds if any(site.kind == kind for site in units)]
        for kind in kinds:
            yield _outcome(case, attention, (kind,), units)
        if len(found) > 1:
            yield _outcome(case, attention, tuple(found), units)


def _outcome(case: str, attention: str, kinds: tuple[Kind, ...], units: Units) -> Row:
    name = "+".join(kinds)
    sites = [site for site in units if site.kind in kinds]
    if not sites:
        reasons = Counter(r.reason for r in units.refusals if r.kind in kinds)
        if reasons:
            return Row(case, attention, name, "refused", reason=reasons.most_common(1)[0][0])
        return Row(case, attention, name, "absent")
    count = sum(site.size for site in sites)
    try:
        with tempfile.TemporaryDirectory() as folder:
            difference, plain = prove(case, attention, kinds, Path(folder))
    except Wrong as error:
        return Row(case, attention, name, "wrong", count, reason=str(error))
    except RuntimeError as error:
        refused = any(part in str(error) for part in ("leave", "Leave", "not finite"))
        outcome = "refused" if refused else "error"
        return Row(case, attention, name, outcome, count, reason=_short(error))
    except Exception as error:
        return Row(case, attention, name, "error", count, reason=_short(error))
    return Row(case, attention, name, "exact", count, difference, plain=plain)


@torch.no_grad()
def prove(case: str, attention: str, kinds: tuple[Kind, ...], folder: Path) -> tuple[float, bool]:
    """Cut a type twice, with a reload after each time, and compare outputs throughout.

    Returns:
        The largest difference, and whether the plain config describes the first result.

    Raises:
        Wrong: Something is unequal, or closing a unit has no effect.
    """
    model = zoo.tiny(case, attention)
    inputs = _inputs(model)
    keys = _saved_keys(model, folder / "stock")
    whole = model(**inputs).logits
    _check_effects(model, inputs, whole, kinds)
    structure = uneven(model, kinds=kinds)
    with gated(model, structure):
        expected = model(**inputs).logits
    worst = _distance("shrunk", shrink(model, structure)(**inputs).logits, expected)
    if not _saved_keys(model, folder / "one") <= keys:
        raise Wrong("the shrunk model saves other keys than the original")
    load = zoo.auto_class(case).from_pretrained
    again = load(folder / "one", attn_implementation=attention).eval()
    worst = max(worst, _distance("reloaded", again(**inputs).logits, expected))
    second = uneven(again, seed=1, drop_layer=False, kinds=kinds)
    if not second.is_full:
        with gated(again, second):
            expected = again(**inputs).logits
        logits = shrink(again, second)(**inputs).logits
        worst = max(worst, _distance("shrunk again", logits, expected))
        again.save_pretrained(folder / "two")
        last = load(folder / "two", trust_remote_code=True, attn_implementation=attention).eval()
        worst = max(worst, _distance("reloaded again", last(**inputs).logits, expected))
    return worst, _is_plain(case, attention, kinds, folder / "plain")


def _is_plain(case: str, attention: str, kinds: tuple[Kind, ...], folder: Path) -> bool:
    """Cut one unit of every site, and tell whether the type's own config describes the result.

    Dimensions go as many at once as the config can say, with heads where these have to.
    """
    model = zoo.tiny(case, attention)
    stream = stream_of(model) if "dimensions" in kinds else None
    if "dimensions" in kinds:
        if kinds != ("dimensions",) or stream is None:
            return False
        kinds = ("heads", "dimensions")
    sites: dict[Kind, Any] = {kind: {} for kind in kinds}
    for site in find_units(model, stream is not None).of(kinds):
        if site.removable and site.size > 1:
            sites[site.kind][site.path] = (_fewer(site, stream), site.size)
    shrink(model, Structure.of(sites))
    if getattr(model.config, "hfslim", None):
        return False
    inputs = _inputs(model)
    model.save_pretrained(folder)
    again = zoo.auto_class(case).from_pretrained(folder, attn_implementation=attention).eval()
    _distance("plain", again(**inputs).logits, model(**inputs).logits)
    return True


def _fewer(site: Site, stream: Stream | None) -> list[int]:
    if stream is None:
        return [i for i in range(site.size) if i != site.removable[-1]]
    heads, dimensions = stream.narrower[-1]
    if site.kind == "heads":
        return list(range(heads))
    return list(range(dimensions if site.path in stream.sites else site.size))


def _check_effects(
    model: PreTrainedModel, inputs: dict[str, Any], whole: torch.Tensor, kinds: tuple[Kind, ...]
) -> None:
    for site in find_units(model, "dimensions" in kinds).of(kinds):
        if not site.removable:
            continue
        one = site.removable[-1:] if site.kind == "layers" else site.removable[1:]
        closed = one or site.removable
        kept = [i for i in range(site.size) if i not in closed]
        with gated(model, Structure.of({site.kind: {site.path: (kept, site.size)}})) as gates:
            logits = model(**inputs).logits
            gates.check_fired()
        if not (logits - whole).abs().max() > EFFECT and not _is_idle(model, inputs, whole, site):
            raise Wrong(f"closing {site.kind} at {site.path} has no effect")


def _is_idle(
    model: PreTrainedModel, inputs: dict[str, Any], whole: torch.Tensor, site: Site
) -> bool:
    """Return whether the output of a site does not reach the logits at all."""
    module = model.get_submodule(site.gate or site.path)

    def disturb(_: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn_like(output)

    with module.register_forward_hook(disturb):
        return torch.equal(model(**inputs).logits, whole)


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    inputs = example_inputs(model, 3, seed=3, length=LENGTHS.get(model.main_input_name))
    if model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        inputs["attention_mask"][0, -4:] = 0
        pad = model.config.get_text_config().pad_token_id
        if pad is not None:
            inputs["input_ids"][0, -4:] = pad
    return inputs


def _saved_keys(model: PreTrainedModel, folder: Path) -> set[str]:
    """Save a model, and return its keys with the layers' numbers replaced."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {re.sub(r"\.\d+\.", ".N.", key) for key in file.keys()}


def _distance(what: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    distance = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    if not distance <= TOLERANCE:
        raise Wrong(f"{what}: differs by {distance:.2g}")
    return distance


def _short(error: BaseException) -> str:
    logging.getLogger("sweep").debug("", exc_info=error)
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:300]


def _work(case: str, kinds: Sequence[Kind], send: Connection, verbose: bool) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.NOTSET if verbose else logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        for row in sweep(case, kinds):
            send.send(row)
    except Exception as error:
        traceback.print_exc()
        send.send(Row(case, "", "sweep", "error", reason=_short(error)))
    send.close()


def run(
    cases: list[str],
    jobs: int,
    limit: float,
    verbose: bool = False,
    kinds: Sequence[Kind] = KINDS,
) -> Iterator[Row]:
    """Run types in processes of their own, `jobs` at a time, for at most `limit` seconds each."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(cases))
    running: dict[Connection, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receive, send = context.Pipe(duplex=False)
            case = waiting.pop()
            process = context.Process(target=_work, args=(case, kinds, send, verbose), daemon=True)
            process.start()
            send.close()
            running[receive] = (case, process, time.monotonic())
        for ready in wait(list(running), timeout=1.0):
            assert isinstance(ready, Connection)
            case, process, _ = running[ready]
            try:
                yield ready.recv()
            except EOFError:
                process.join()
                if process.exitcode:
                    yield Row(case, "", "process", "error", reason=f"exit {process.exitcode}")
                del running[ready]
        for receive, (case, process, start) in list(running.items()):
            if time.monotonic() - start > limit:
                process.kill()
                process.join()
                yield Row(case, "", "process", "error", reason=f"no end after {limit:g} s")
                del running[receive]


def record(rows: list[Row]) -> None:
    """Write what came out into the package's coverage table, over what is there of these types."""
    path = Path(hfslim.__file__).parent / "anatomy" / "coverage.json"
    types = json.loads(path.read_text())["types"] if path.exists() else {}
    for case in dict.fromkeys(row.case for row in rows if "/" in row.case):
        task, name = case.split("/")
        mine = [row for row in rows if row.case == case]
        if mine[0].outcome == "missing" and name in types.get(task, {}):
            # What was found where the package is, as timm in `make test-timm`, still holds.
            continue
        entry: dict[str, Any] = types.get(task, {}).get(name, {})
        reasons, plain = entry.pop("reasons", {}), set(entry.pop("plain", []))
        swept = {row.kind for row in mine} & set(KINDS) or set(KINDS)
        for kind in (kind for kind in KINDS if kind in swept):
            seen = {row.outcome: row for row in mine if row.kind == kind} or {
                "error": next((row for row in mine if row.outcome == "error"), mine[0])
            }
            outcome = next(o for o in ("wrong", "error", "refused", "absent", "exact") if o in seen)
            entry[kind] = "failed" if outcome in ("wrong", "error") else outcome
            reasons.pop(kind, None)
            if outcome != "exact" and seen[outcome].reason:
                reasons[kind] = seen[outcome].reason
        plain -= swept
        plain |= {row.kind for row in mine if row.plain and "+" not in row.kind}
        entry |= {"reasons": reasons} if reasons else {}
        types.setdefault(task, {})[name] = entry | ({"plain": sorted(plain)} if plain else {})
    types = {task: dict(sorted(types[task].items())) for task in zoo.TASKS if task in types}
    table = {"transformers": transformers.__version__, "types": types}
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    write_page()


def shares(rows: Sequence[Coverage]) -> dict[str, tuple[int, int]]:
    """Count the types that are cut exactly, of those with such units that could be built.

    Heads and channels make one count, neurons and experts another: each is a way of narrowing the
    same part of a layer. A type that has no such part counts in neither number.

    Args:
        rows: The types.

    Returns:
        Number cut exactly and number of types, for `heads or channels`, `neurons` and `layers`.
    """
    built = [row for row in rows if {"exact", "refused"} & set(row.outcomes.values())]
    counts = {}
    for name, kinds in (
        ("heads or channels", ("heads", "channels")),
        ("neurons", ("neurons", "experts")),
        ("layers", ("layers",)),
    ):
        found = [{row.outcomes[kind] for kind in kinds} for row in built]
        present = [outcomes for outcomes in found if outcomes - {"absent", "untried"}]
        counts[name] = sum("exact" in outcomes for outcomes in present), len(present)
    return counts


def markdown(rows: Sequence[Coverage]) -> str:
    """Return a Markdown table of the rows."""
    head = ("type", *COLUMNS, "plain reload")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        signs = (SIGNS[row.outcomes[kind]] for kind in COLUMNS)
        lines.append(" | ".join((f"`{row.model_type}`", *signs, ", ".join(row.plain))))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def page() -> str:
    """Return the documentation page of the coverage."""
    titles = {"text": "Text", "image": "Images", "audio": "Speech and audio"}
    counts = [f"{name} of {exact} of {all_}" for name, (exact, all_) in shares(coverage()).items()]
    parts = [INTRODUCTION.format(version=measured()["transformers"], shares=", ".join(counts))]
    for task, title in titles.items():
        rows = coverage([task])
        parts.append(f"## {title}\n\n{markdown(rows)}")
    reasons = [
        f"- `{row.model_type}`, {kind}: {reason}"
        for row in coverage()
        for kind, reason in row.reasons.items()
    ]
    return "\n".join([*parts, "## Why not\n", *reasons]) + "\n"


def write_page() -> None:
    """Write the page of the documentation from the package's coverage table."""
    measured.cache_clear()
    (ROOT / "docs" / "families.md").write_text(page())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="types as transformers names them, all if none")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of units")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one type")
    parser.add_argument("--json", type=Path, help="where the outcomes go")
    parser.add_argument("--write", action="store_true", help="bring the coverage table up to date")
    parser.add_argument("--page", action="store_true", help="only write docs/families.md")
    parser.add_argument("--verbose", action="store_true", help="with tracebacks and logs")
    arguments = parser.parse_args()
    if arguments.page:
        write_page()
        return 0
    own = [name for name in arguments.types if ":" in name]
    known = {*zoo.CASES, *(case.split("/")[1] for case in zoo.CASES)}
    unknown = sorted(set(arguments.types) - known - set(own))
    if unknown:
        parser.error(
            f"transformers has no classifier of type {unknown}; expected some of its types"
        )
    named = [c for c in zoo.CASES if {c, c.split("/")[1]} & set(arguments.types)]
    cases = own + named if arguments.types else list(zoo.CASES)
    if arguments.verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("sweep").setLevel(logging.DEBUG)
    rows = []
    for row in run(cases, arguments.jobs, arguments.limit, arguments.verbose, arguments.kinds):
        rows.append(row)
        print(
            f"{row.case:32} {row.attention:6} {row.kind:22} {row.outcome:8} {row.units:4} "
            f"{row.difference:.0e} {row.reason}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.write:
        record(rows)
    bad = [row for row in rows if row.outcome in ("wrong", "error")]
    print(f"{len(cases)} types; {Counter(row.outcome for row in rows)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
