"""The labels decide the problem type for `obs` where the config does not, as for the Trainers."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hfslim.anatomy.outputs import problem_type
from hfslim.pruning.obs.backward_pass import decision_factors, run_backward


@pytest.mark.parametrize("declared", [None, "multi_label_classification"])
def test_float_labels_make_a_multi_label_problem(declared, monkeypatch) -> None:
    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        problem_type=declared,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    seen = []

    def watched(logits, problem):
        seen.append(problem)
        return decision_factors(logits, problem)

    monkeypatch.setattr("hfslim.pruning.obs.backward_pass.decision_factors", watched)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 3)}
    run_backward(model, {"classifier": model.classifier}, [batch], lambda *_: None)
    assert seen == [problem_type(config, batch["labels"])] == ["multi_label_classification"]
