"""Load folders where hfslim cannot be imported, run them, save them again, load and run that.

Arguments: a JSON list of [folder, auto class, whether to trust remote code], or `@` and its file.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    sys.modules["hfslim"] = None  # Whoever imports it from here on gets an ImportError.
    given = sys.argv[1]
    jobs = Path(given[1:]).read_text() if given.startswith("@") else given
    for folder, auto_class, trust in json.loads(jobs):
        load = getattr(transformers, auto_class).from_pretrained
        inputs = torch.load(Path(folder) / "inputs.pt")
        arguments = {"trust_remote_code": trust}
        if given.startswith("@"):
            arguments["attn_implementation"] = "eager"
        model = load(folder, **arguments).eval()
        with torch.no_grad():
            first = model(**inputs)["logits" if "Classification" in auto_class else 0]
        model.save_pretrained(Path(folder) / "again")
        again = load(Path(folder) / "again", **arguments).eval()
        with torch.no_grad():
            second = again(**inputs)["logits" if "Classification" in auto_class else 0]
        torch.save({"first": first, "second": second}, Path(folder) / "outputs.pt")
    assert not any(name.startswith("hfslim.") for name in sys.modules)
