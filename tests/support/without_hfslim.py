"""Load folders where hfslim cannot be imported, run them, save them again, load and run that.

Arguments: a JSON list of [folder, auto class, whether to trust remote code].
"""

import json
import sys
from pathlib import Path

import torch
import transformers

if __name__ == "__main__":
    sys.modules["hfslim"] = None  # Whoever imports it from here on gets an ImportError.
    for folder, auto_class, trust in json.loads(sys.argv[1]):
        load = getattr(transformers, auto_class).from_pretrained
        inputs = torch.load(Path(folder) / "inputs.pt")
        model = load(folder, trust_remote_code=trust).eval()
        with torch.no_grad():
            first = model(**inputs).logits
        model.save_pretrained(Path(folder) / "again")
        again = load(Path(folder) / "again", trust_remote_code=trust).eval()
        with torch.no_grad():
            second = again(**inputs).logits
        torch.save({"first": first, "second": second}, Path(folder) / "outputs.pt")
    assert not any(name.startswith("hfslim.") for name in sys.modules)
