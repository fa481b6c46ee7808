from pathlib import Path

import pytest
import torch
from models import tiny
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
)

from hfslim import DistillationConfig, DistillationTrainer
from hfslim.distillation.teacher.labels import align_labels
from hfslim.distillation.teacher.teacher import load_teacher, run_teacher
from hfslim.distillation.teacher.teacher_quality import UntrainedTeacherError, check_quality
from hfslim.distillation.teacher.teachers import Teachers


def config(*names: str, **kwargs: object) -> BertConfig:
    return BertConfig(
        id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **kwargs
    )


def test_labels_are_found_by_name_whatever_their_case_and_order() -> None:
    order = align_labels(config("Dog", "cat", "OWL"), config("owl", " dog", "Cat"))
    assert order.tolist() == [1, 2, 0]


def test_outputs_without_names_are_those_of_the_student_by_position() -> None:
    for names in (("LABEL_0", "LABEL_1"), ("0", "1")):
        assert align_labels(config("no", "yes"), config(*names)) is None
        assert align_labels(config(*names), config("no", "yes")) is None
    assert align_labels(config("no", "yes"), config("1", "0")).tolist() == [1, 0]


def test_keys_of_id2label_may_be_strings() -> None:
    student = config("b", "a")
    student.id2label = {"1": "a", "0": "b"}
    assert align_labels(student, config("a", "b")).tolist() == [1, 0]
    student.id2label = {1: "a", 2: "b"}
    with pytest.raises(ValueError, match=r"keys \[1, 2\]; expected .* 0 to 1"):
        align_labels(student, config("a", "b"))


def test_a_teacher_whose_order_another_would_fit_is_told_that_order() -> None:
    labels = torch.arange(90) % 3
    swapped = torch.eye(3)[torch.tensor([0, 2, 1])[labels]]
    with pytest.raises(UntrainedTeacherError, match=r"order \[0, 2, 1\].*config.id2label"):
        check_quality(swapped, labels, "single_label_classification")


def test_labels_in_the_same_order_need_no_reordering() -> None:
    assert align_labels(config("a", "b"), config("A", "B")) is None
    assert align_labels(config("LABEL_0", "LABEL_1"), config("LABEL_0", "LABEL_1")) is None


def test_regression_models_have_nothing_to_align() -> None:
    assert align_labels(config("score"), config("LABEL_0")) is None


@pytest.mark.parametrize("names", [("a", "c"), ("a", "b", "c"), ("LABEL_1", "LABEL_2")])
def test_labels_that_do_not_match_are_an_error_that_lists_both(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="do not match") as error:
        align_labels(config("a", "b"), config(*names))
    assert "['a', 'b']" in str(error.value) and str(list(names)) in str(error.value)


def test_names_that_occur_twice_and_other_problems_are_errors() -> None:
    with pytest.raises(ValueError, match="more than once"):
        align_labels(config("a", "A"), config("a", "A"))
    with pytest.raises(ValueError, match="must agree"):
        align_labels(
            config("a", "b", problem_type="single_label_classification"),
            config("a", "b", problem_type="multi_label_classification"),
        )


@pytest.mark.parametrize("family", ["bert", "vit", "wav2vec2", "whisper"])
def test_a_folder_loads_with_the_task_of_the_student(family: str, tmp_path: Path) -> None:
    saved = tiny(family)
    saved.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, tiny(family, seed=1))
    assert type(teacher) is type(saved)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])


def test_a_folder_without_a_head_is_refused_unless_allowed(tmp_path: Path) -> None:
    student = tiny("bert")
    BertModel(student.config).save_pretrained(tmp_path)
    with pytest.raises(UntrainedTeacherError, match=r"classifier\.bias.*allow_untrained_teacher"):
        load_teacher(tmp_path, student)
    assert load_teacher(str(tmp_path), student, allow_untrained=True).config.num_labels == 3


def test_a_model_with_a_fresh_head_is_refused_unless_allowed() -> None:
    student = tiny("bert")
    fresh = BertForSequenceClassification(student.config)
    with pytest.raises(UntrainedTeacherError, match="'classifier'"):
        load_teacher(fresh, student)
    assert load_teacher(fresh, student, allow_untrained=True) is fresh


def test_the_student_and_other_things_are_no_teachers() -> None:
    student = tiny("bert")
    with pytest.raises(ValueError, match="the student itself"):
        load_teacher(student, student)
    with pytest.raises(TypeError, match="int"):
        load_teacher(3, student)
    with pytest.raises(ValueError, match="Linear is no"):
        load_teacher("anywhere", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="without its weights"):
        load_teacher(tiny("bert").to("meta"), student)


def test_a_teacher_with_weights_that_the_student_trains_is_refused() -> None:
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    student.bert.embeddings = teacher.bert.embeddings
    with pytest.raises(ValueError, match=r"holds 5 weights that the student trains, such as bert"):
        load_teacher(teacher, student)
    assert all(p.requires_grad for p in student.parameters())
    student.bert.embeddings.requires_grad_(False)
    assert load_teacher(teacher, student) is teacher
    adapted = get_peft_model(student, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"such as .*lora_A"):
        load_teacher(adapted.get_base_model(), adapted)


def test_a_teacher_that_lies_in_two_places_is_put_in_one(tmp_path: Path) -> None:
    # As where an adapter's own head is added to a base that is on the accelerator already.
    student, teacher = tiny("bert"), tiny("bert", seed=1)
    teachers = Teachers([teacher], [None], student, None, DistillationConfig(str(tmp_path)))
    teacher.bert.to("meta")
    teachers.place(torch.device("meta"))
    assert {p.device.type for p in teacher.parameters()} == {"meta"}


def test_the_teacher_gets_what_it_reads_and_answers_in_the_students_order() -> None:
    teacher = tiny("distilbert").eval()
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "labels": ids[:, 0]}
    logits = run_teacher(teacher, inputs, torch.tensor([2, 0, 1]))
    assert torch.equal(logits, teacher(input_ids=ids).logits[:, [2, 0, 1]])
    assert not logits.requires_grad
    with pytest.raises(ValueError, match="reads 'input_ids', the batch holds pixel_values"):
        run_teacher(teacher, {"pixel_values": ids}, None)


def test_skill_is_the_recall_averaged_over_classes() -> None:
    # 90 of class 0, all found; 10 of class 1, six found.
    labels = torch.tensor([0] * 90 + [1] * 10)
    guess = torch.tensor([0] * 90 + [1] * 6 + [0] * 4)
    score = check_quality(torch.eye(2)[guess], labels, "single_label_classification")
    assert score == pytest.approx(0.8)


def test_a_constant_answer_is_chance_level_however_often_it_is_right() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    constant = torch.tensor([[1.0, 0.0]]).expand(100, 2)
    with pytest.raises(UntrainedTeacherError, match=r"0\.500, which is chance level"):
        check_quality(constant, labels, "single_label_classification")


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_outputs_must_correlate_with_the_labels(problem: str) -> None:
    torch.manual_seed(0)
    labels = (torch.randn(200, 2) > 0).float()
    related = labels + torch.randn(200, 2)
    # The noise has variance 1, the labels 1/4: the correlation is sqrt(1/5).
    assert check_quality(related, labels, problem) == pytest.approx(0.2**0.5, abs=0.08)
    with pytest.raises(UntrainedTeacherError, match="correlation"):
        check_quality(-related, labels, problem)


def test_few_examples_allow_no_verdict() -> None:
    labels = torch.tensor([0, 1] * 10)
    assert check_quality(torch.zeros(20, 2), labels, "single_label_classification") is None


@pytest.mark.parametrize("labels", [torch.ones(40, 3).long(), torch.ones(40)])
def test_labels_that_do_not_fit_are_told_before_skill(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="needs one integer label per example"):
        check_quality(torch.zeros(40, 3), labels, "single_label_classification")


def test_a_teacher_that_cannot_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"teacher '.*nowhere' is no folder of a model"):
        load_teacher(tmp_path / "nowhere", tiny("bert"))


def test_more_labels_than_the_students_are_left_out_when_asked() -> None:
    student, teacher = config("cat", "dog"), config("owl", "dog", "cat")
    with pytest.raises(ValueError, match="teacher_subset=True"):
        align_labels(student, teacher)
    assert align_labels(student, teacher, allow_subset=True).tolist() == [2, 1]
    with pytest.raises(ValueError, match="the same names"):
        align_labels(config("cat", "fox"), teacher, allow_subset=True)


def test_a_subset_gives_the_probabilities_among_the_students_labels() -> None:
    teacher = tiny("bert").eval()
    ids = torch.tensor([[5, 6, 7]])
    whole = teacher(input_ids=ids).logits.softmax(-1)
    part = run_teacher(teacher, {"input_ids": ids}, torch.tensor([2, 1])).softmax(-1)
    expected = whole[:, [2, 1]] / whole[:, [2, 1]].sum(-1, keepdim=True)
    assert torch.allclose(part, expected, atol=1e-6)


def test_a_dtype_applies_to_folders_and_to_models(tmp_path: Path) -> None:
    student, saved = tiny("bert"), tiny("bert", seed=1)
    saved.save_pretrained(tmp_path)
    for teacher in (str(tmp_path), saved):
        loaded = load_teacher(teacher, student, dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert load_teacher(str(tmp_path), student).dtype == torch.float32


def test_a_revision_is_what_the_hub_cache_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The layout of the Hub's cache: two revisions of one model, each with its own weights.
    home = tmp_path / "models--user--teacher"
    for seed, (name, commit) in enumerate({"main": "a" * 40, "v2": "b" * 40}.items()):
        tiny("bert", seed=seed).save_pretrained(home / "snapshots" / commit)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    student = tiny("bert", seed=5)
    for source, seed in (("user/teacher", 0), ("user/teacher@v2", 1)):
        weight = load_teacher(source, student).classifier.weight
        assert torch.equal(weight, tiny("bert", seed=seed).classifier.weight)


def tokenizer(*words: str) -> BertTokenizer:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return BertTokenizer(vocab={word: i for i, word in enumerate((*special, *words))})


def test_a_teacher_that_reads_ids_as_other_words_is_refused(tmp_path: Path) -> None:
    student, own = tiny("bert"), tokenizer("good", "bad")
    settings = DistillationConfig(str(tmp_path), use_cpu=True, allow_untrained_teacher=True)
    for folder, words in (("same", ("good", "bad")), ("other", ("bad", "good"))):
        tiny("bert", seed=1).save_pretrained(tmp_path / folder)
        tokenizer(*words).save_pretrained(tmp_path / folder)
    parts = {"args": settings, "processing_class": own}
    DistillationTrainer(student, teacher=str(tmp_path / "same"), **parts)
    refused = pytest.raises(ValueError, match=r"2 of 7 tokens have other ids.*'bad', 'good'")
    with refused:
        DistillationTrainer(student, teacher=str(tmp_path / "other"), **parts)
    # A model that was loaded tells from where; so does a student whose tokenizer nobody named.
    load = BertForSequenceClassification.from_pretrained
    with refused:
        DistillationTrainer(student, teacher=load(tmp_path / "other"), **parts)
    with refused:
        collator = DataCollatorWithPadding(own)
        other = load(tmp_path / "other")
        DistillationTrainer(student, settings, teacher=other, data_collator=collator)
    with refused:
        DistillationTrainer(load(tmp_path / "same"), settings, teacher=str(tmp_path / "other"))
    more = load(tmp_path / "same")
    more.resize_token_embeddings(70)
    own.add_tokens("dull")
    DistillationTrainer(student, teacher=more, **parts)


def test_a_teacher_with_fewer_tokens_than_the_students_is_refused(tmp_path: Path) -> None:
    teacher = tiny("bert", seed=1, vocab_size=8)
    parts = {"args": DistillationConfig(str(tmp_path), use_cpu=True), "teacher": teacher}
    own = tokenizer(*(f"w{i}" for i in range(40)))
    with pytest.raises(ValueError, match=r"ids up to 44, .* of 8; pass teacher_processor"):
        DistillationTrainer(tiny("bert"), processing_class=own, **parts)
    # Ids that the student does not know itself occur in no text.
    student = tiny("bert", vocab_size=16)
    DistillationTrainer(student, processing_class=own, **parts)
