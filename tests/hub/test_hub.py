import subprocess
import sys

import pytest
from models import tiny
from structures import uneven
from transformers import AutoModelForSequenceClassification

import hfslim

LOADS = """
import sys
{first}
{second}
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
"""


def _python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_importing_hfslim_imports_neither_torch_nor_models():
    heavy = "{'torch', 'transformers.modeling_utils', 'datasets', 'sklearn'}"
    assert _python(f"import hfslim, sys; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("order", [1, -1], ids=["hfslim first", "transformers first"])
def test_a_new_process_needs_the_import_only(order, tmp_path):
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    model.save_pretrained(tmp_path)
    first, second = ("import hfslim", "import transformers.modeling_utils")[::order]
    found = _python(LOADS.format(first=first, second=second), tmp_path)
    expected = sum(p.numel() for p in model.parameters())
    assert found == f"BertForSequenceClassification {expected}"


def test_every_public_name_is_there():
    for name in hfslim.__all__:
        assert callable(getattr(hfslim, name)), name
    assert set(hfslim.__all__) <= set(dir(hfslim))


def test_functions_stay_functions_once_the_modules_of_their_names_load():
    import hfslim.measuring
    import hfslim.pruning.oneshot

    assert hfslim.prune.__name__ == "prune"
    assert hfslim.measure.__name__ == "measure"


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(AttributeError, match=r"no attribute 'pruned'; it has \['Distillation"):
        hfslim.pruned  # noqa: B018


def test_loading_without_the_loader_fails_loudly(tmp_path):
    model = tiny("bert")
    hfslim.shrink(model, uneven(model))
    del model.config.quantization_config
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
