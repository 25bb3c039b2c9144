"""Who teaches on what: a teacher's own prompts, several teachers, the policy itself, prefixes."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval.traces
import options
import train
from config import teachers_of, validate
from data.batch import Document, GlobalBatch, consecutive
from data.dataset import Dataset
from data.formats import to_example
from data.formatter import Formatter
from data.teacher_cache import _digest
from errors import UserError
from kernels.attention import PackedAttention
from losses.kd import KDConfig, kd_loss
from model.checkpoint import build_model
from model.optim import average_of, update_average
from model.transformer import ModelConfig
from rl.logprobs import add_teacher_logprobs, teacher_topk
from rl.rollout import Rollouts, _from_json, _to_json
from rl.sample import RolloutConfig
from tests import distributed_workers as workers
from tests.test_formatter import with_template
from toy_models import toy_tokenizer

VOCAB = 40


@functools.cache
def models():
    """A student and two teachers of other widths, in fp64."""
    made = []
    for seed, heads in enumerate((2, 3, 1)):
        shape = ModelConfig(
            vocab_size=VOCAB + seed,
            hidden_size=8 * heads,
            intermediate_size=16,
            num_layers=1,
            num_heads=heads,
            num_kv_heads=1,
            head_dim=8,
        )
        made.append(build_model(shape, None, device="cpu", seed=seed, weight_dtype=torch.float64))
    return made[0], [teacher.requires_grad_(False) for teacher in made[1:]]


def documents():
    """Of two teachers, some with a prompt for theirs, shorter or longer than the student's."""
    rng = np.random.default_rng(0)
    made = []
    for number, (prompt, answer, taught) in enumerate(
        [(3, 4, 9), (5, 6, 1), (2, 3, None), (4, 1, 4), (1, 5, 12), (6, 2, None)]
    ):
        ids = rng.integers(0, VOCAB, prompt + answer)
        document = Document.of_completion(ids[:prompt], ids[prompt:])
        given = None if taught is None else rng.integers(0, VOCAB, taught)
        made.append(document.taught(number % 2, given))
    made.append(Document(np.arange(6), np.zeros(6)).taught(1, [1, 2]))  # without any loss
    return made


def log_probs(model, tokens):
    """[T, V] by a pass of this one sequence, for which nothing is packed."""
    tokens = torch.as_tensor(np.asarray(tokens)).long()
    attend = PackedAttention([len(tokens)], torch.device("cpu"))
    hidden = model(tokens, torch.arange(len(tokens)), attend)
    return (hidden @ model.head_VD[:VOCAB].T).log_softmax(1)


def restated(student, teachers, docs):
    """Mean forward KL over the completions: the teacher reads its own prompt, then the same."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for d in docs:
        trained = int(np.count_nonzero(d.weights))
        if not trained:
            continue
        seen = d.tokens if d.teacher_tokens is None else d.teacher_tokens
        assert list(seen[-trained:]) == list(d.tokens[-trained:])
        teacher = log_probs(teachers[d.teacher], seen)[-trained - 1 : -1]
        own = log_probs(student, d.tokens)[-trained - 1 : -1]
        total = total + (teacher.exp() * (teacher - own)).sum()
        count += trained
    return total / count


@pytest.mark.parametrize("micro_batch_tokens", [14, 21, 1000])
@pytest.mark.parametrize("topk", [0, VOCAB])
def test_a_teacher_of_its_own_prompt_is_the_restated_loss_however_cut(micro_batch_tokens, topk):
    """Two teachers of other widths; the teacher's documents are longer than a micro-batch, too."""
    student, teachers = models()
    docs = documents()
    want = restated(student, teachers, docs)
    student.zero_grad()
    want.backward()
    grad = torch.cat([p.grad.flatten() for p in student.parameters()])
    loss = functools.partial(
        kd_loss, cfg=KDConfig("forward_kl", vocab=VOCAB, signal="topk" if topk else "full", k=topk)
    )
    for order in (docs, docs[::-1]):
        metrics, got = workers.gradient(student, teachers, loss, order, micro_batch_tokens)
        assert metrics["loss"] == pytest.approx(want.item(), rel=1e-10)
        assert (got - grad).norm() / grad.norm() < 1e-10
    plain = [d.taught(0, None) for d in docs]
    metrics, _ = workers.gradient(student, teachers, loss, plain, micro_batch_tokens)
    assert metrics["loss"] != pytest.approx(want.item(), rel=1e-3), "the prompts matter"


def test_ranks_with_documents_of_one_teacher_each_add_up():
    student, teachers = models()
    docs = documents()
    loss = functools.partial(kd_loss, cfg=KDConfig("jsd", vocab=VOCAB))
    _, whole = workers.gradient(student, teachers, loss, docs, 1000)
    norm, parts = GlobalBatch(docs).normalizer, []
    for number in range(2):
        share = [d for d in docs if d.teacher == number]
        _, part = workers.gradient(student, teachers, loss, share, 14)
        parts.append(part * GlobalBatch(share).normalizer / norm)
    assert (sum(parts) - whole).norm() / whole.norm() < 1e-10


def test_sampled_and_cached_signals_read_the_teachers_prompt():
    _, (teacher, _) = models()
    docs = [d.taught(0, None if d.teacher_tokens is None else [7, 8, 9]) for d in documents()]
    config = RolloutConfig(1, lambda d: d, 8, [], VOCAB, micro_batch_tokens=20)
    add_teacher_logprobs(docs, teacher, config)
    rows = list(
        teacher_topk(docs, teacher, VOCAB, temperature=1.0, vocab=VOCAB, micro_batch_tokens=20)
    )
    ids, logp = (np.concatenate(part) for part in zip(*rows, strict=True))
    row = 0
    for d in docs:
        start, trained = d.completion_start, int(np.count_nonzero(d.weights))
        prompt = d.tokens[:start] if d.teacher_tokens is None else [7, 8, 9]
        every = log_probs(teacher, [*prompt, *d.tokens[start:]])
        for place in range(trained):
            want = every[len(prompt) + place - 1]
            token = int(d.tokens[start + place])
            assert float(d.fields["teacher_logp"][start + place]) == pytest.approx(
                float(want[token]), rel=1e-9
            )
            assert logp[row, np.flatnonzero(ids[row] == token)[0]] == pytest.approx(
                float(want[token]), abs=1e-5
            )
            row += 1
    assert row == len(ids)


def test_documents_keep_their_teacher():
    docs = documents()
    for d, again in zip(
        docs, [_from_json(json.loads(json.dumps(_to_json(d))), 50, 9) for d in docs], strict=True
    ):
        assert again.teacher == d.teacher
        assert np.array_equal(again.for_teacher().tokens, d.for_teacher().tokens)
    assert (
        _digest(docs[:1]) != _digest([docs[0].taught(0, [3])]) != _digest([docs[0].taught(0, None)])
    )
    assert all(sum(map(len, part)) <= 14 for part in consecutive(docs, 14))
    assert [d for part in consecutive(docs, 14) for d in part] == docs


# --- data ---------------------------------------------------------------------------------------


def dataset(tmp_path, rows, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    formatter = Formatter(toy_tokenizer(), "plain")
    return Dataset(str(path), formatter, seed=0, max_tokens=200, vocab=10**6, **more)


ROW = {"question": "Mia has 3 coins.", "answer": "3+0=3. #### 3"}


def test_the_column_is_read_as_the_question_is(tmp_path):
    told = "3+0=3. Mia has 3 coins."
    data = dataset(tmp_path, [ROW | {"teacher_prompt": told}, ROW], teachers=["t"])
    first, second = data.get(0), data.get(1)
    asked = data.formatter.prompt(to_example(ROW | {"question": told}, "x"))
    assert list(first.for_teacher().tokens) == [*asked, *first.tokens[first.completion_start :]]
    assert list(first.tokens) == list(second.tokens) and second.teacher_tokens is None
    messages = [{"role": "user", "content": told}]
    same = dataset(tmp_path, [ROW | {"teacher_prompt": messages}], teachers=["t"]).get(0)
    assert list(same.teacher_tokens) == list(first.teacher_tokens)
    assert dataset(tmp_path, [ROW | {"teacher_prompt": told}]).get(0).teacher_tokens is None
    assert "no prompt and no gold answer: teacher_prompt" in " ".join(
        dataset(tmp_path, [ROW | {"teacher_prompt": told}]).notes
    )
    assert not any("not read" in note for note in data.notes)


def test_a_form_shows_question_and_answer_and_the_column_goes_first(tmp_path):
    def data(row):
        made = dataset(tmp_path, [ROW | {"answer": r"{question} 3. #### 3"}, row])
        made.formatter.teacher_form = "S: {answer}\nQ: {question} {x}"
        return made

    made = data(ROW | {"teacher_prompt": "{answer}?"})
    by_answer = {made.example(i).messages[-1]["content"]: made.example(i) for i in range(2)}
    asked = functools.partial(to_example, origin="x")
    for example, want in (
        (by_answer[r"{question} 3. #### 3"], "S: {question} 3. #### 3\nQ: Mia has 3 coins. {x}"),
        (by_answer[ROW["answer"]], "{answer}?"),
    ):
        told = made.formatter.prompt(asked(ROW | {"question": want}))
        assert made.formatter.teacher_prompt(example) == told
    with pytest.raises(UserError, match="this row has none"):
        made.formatter.teacher_prompt(asked({"question": "Mia?"}))


def test_rows_choose_among_several_teachers(tmp_path):
    rows = [ROW | {"teacher": name} for name in ("code", "math", "code")]
    data = dataset(tmp_path, rows, teachers=["math", "code"])
    for i in range(3):
        assert ["math", "code"][data.get(i).teacher] == data.example(i).teacher
    for micro in GlobalBatch([data.get(i) for i in range(3)]).split(1000):
        assert len({d.teacher for d in micro.documents}) == 1
    with pytest.raises(UserError, match="'teacher' is None and must be one of math, code") as e:
        dataset(tmp_path, [ROW], teachers=["math", "code"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("teacher_prompt", "what"),
    [
        ("coins " * 300, "tokens for the teacher"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "assistant's"),
        (7, "teacher_prompt"),
    ],
)
def test_a_wrong_prompt_of_the_teacher_is_refused_by_the_row(teacher_prompt, what, tmp_path):
    with pytest.raises(UserError, match=what) as e:
        dataset(tmp_path, [ROW | {"teacher_prompt": teacher_prompt}], teachers=["t"])
    assert "rows.jsonl:1" in str(e.value) and "\n" not in str(e.value)


def test_what_is_validated_has_no_teacher(tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps(ROW | {"question": "Another?"}) + "\n")
    more = dict(eval_data=str(tmp_path / "val.jsonl"), eval_examples=1)
    data = dataset(tmp_path, [ROW | {"teacher": "a"}], teachers=["a", "b"], **more)
    (document,) = data.validation_documents()
    assert document.teacher_tokens is None and document.weights.any()


def test_a_prompt_for_one_of_several_turns_is_refused(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    row = {"messages": turns, "teacher_prompt": "hint"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    formatter = Formatter(
        with_template(toy_tokenizer(), "reasoning"), "chat"
    )  # it rewrites earlier turns
    options = dict(seed=0, max_tokens=200, vocab=10**6)
    assert len(Dataset(str(path), formatter, **options)) == 2
    with pytest.raises(UserError, match="several turns"):
        Dataset(str(path), formatter, teachers=["t"], **options)


def parsed(*given):
    return options.parse(train.Config, ["--mode=kd", *given])


def test_teachers_are_named(tmp_path):
    assert teachers_of(parsed("--teacher=math=a,code=b")) == {"math": "a", "code": "b"}
    assert teachers_of(parsed("--teacher=a")) == {"a": "a"}
    folder = tmp_path / "lr=1"
    folder.mkdir()
    assert list(teachers_of(parsed(f"--teacher={folder}"))) == [str(folder)]
    for wrong, words in {
        "--teacher=a=x,b": "write several as",
        "--teacher=a=x,a=y": "write several as",
        "--teacher=a=x,b=self": "self teaches alone; name a folder for 'b'",
        "--teacher=math=self": "self teaches alone; name a folder for 'math'",
    }.items():
        with pytest.raises(UserError, match=words):
            validate(parsed(wrong))
    topk = ("--kd_signal=topk", "--kd_cache=c")
    for wrong in (
        ("--teacher=a=x,b=y", *topk),
        ("--teacher=a=x,b=y", "--kd_prefix=teacher"),
        ("--teacher=self_average", *topk),
        ("--kd_prefix=student", "--sample_tokens=8", "--sample_tokens_start=9"),
    ):
        with pytest.raises(UserError):
            validate(parsed(*wrong))
    with pytest.raises(UserError, match="kd_average"):
        parsed("--kd_average=0.9")


# --- samples that grow, and that go on from the reference ---------------------------------------


class Recorded(Rollouts):
    def generate(self, prompts, seeds):
        self.asked = prompts
        self.limits = [*getattr(self, "limits", []), self.token_limit()]
        return [SimpleNamespace(tokens=[5, 6], logp=[-1.0, -1.0], stopped=True) for _ in prompts]


def rollouts(data, **changes):
    config = RolloutConfig(1, lambda d: d, 40, [], 10**6, **changes)
    student, teachers = models()
    return Recorded(data, student, config, teachers[:1])


def test_the_limit_grows_with_the_number_of_the_rollout_alone(tmp_path):
    data = dataset(tmp_path, [ROW], completions=False)
    source = rollouts(data, start_tokens=10, rollouts=4)
    for _ in range(5):
        next(source)
    assert source.limits == [10, 20, 30, 40, 40]
    resumed = rollouts(data, start_tokens=10, rollouts=4)
    source = rollouts(data, start_tokens=10, rollouts=4)
    next(source)
    next(source)
    resumed.load(json.loads(json.dumps(source.state())))
    next(resumed)
    assert resumed.limits == [30]
    assert rollouts(data).token_limit() == 40


def test_samples_go_on_from_the_reference(tmp_path):
    """Its first tokens are part of both prompts and carry no loss; at most half is given."""
    row = ROW | {"teacher_prompt": "3+0=3. Mia has 3 coins."}
    for given in (2, 1000):
        data = dataset(tmp_path, [row], teachers=["t"])
        data.prefix_tokens = given
        answer = data.get(0).tokens[data.get(0).completion_start :].tolist()
        kept = answer[: min(given, len(answer) // 2)]
        source = rollouts(data, taught=True, continues=True)
        (document,) = next(source).documents
        prompt = [*data.formatter.prompt(data.example(0)), *kept]
        assert source.asked == [prompt] and 0 < len(kept) < len(answer)
        assert document.tokens.tolist() == [*prompt, 5, 6]
        assert document.weights.tolist() == [0] * len(prompt) + [1, 1]
        told = data.formatter.teacher_prompt(data.example(0))
        assert document.teacher_tokens.tolist() == [*told, *kept, 5, 6]


# --- the policy as its own teacher --------------------------------------------------------------


def test_the_average_is_the_restated_one_and_shares_what_is_frozen():
    student, _ = models()
    first, second = list(student.parameters())[:2]
    second.requires_grad_(False)
    average = average_of(student)
    try:
        copied, shared = list(average.parameters())[:2]
        assert shared is second and copied is not first and not copied.requires_grad
        want = first.detach().clone()
        for change in (0.5, -2.0):
            with torch.no_grad():
                first.add_(change)
            update_average(average, student, 0.9)
            want = 0.9 * want + 0.1 * first.detach()
        torch.testing.assert_close(copied.detach(), want, rtol=1e-12, atol=0)
    finally:
        with torch.no_grad():
            first.add_(1.5)
        second.requires_grad_(True)


def run(tmp_path, name, *given, steps=4):
    argv = ["--mode=kd", "--model=tiny", "--kd_temperature=1", "--batch_size=4", f"--steps={steps}"]
    argv += ["--warmup=0", "--schedule=constant", "--eval_examples=0", "--dtype=float64"]
    argv += ["--save_every=2", "--max_checkpoints=9", f"--runs={tmp_path}", f"--name={name}"]
    assert train.main([*argv, *given]) == 0
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


TOLD = "--teacher_prompt={answer}\n{question}"
SAMPLED = ("--kd_prefix=student", "--sample_tokens=6", "--kd_divergence=reverse_kl")


@pytest.mark.parametrize("lora", [(), ("--lora_rank=2",)])
def test_the_policy_as_it_began_has_nothing_to_say_at_first(lora, tmp_path, undrawn):
    """But it has, once it sees the solution."""
    plain = run(tmp_path, "a", "--teacher=self", "--data=word_problems:8", *SAMPLED, *lora, steps=1)
    told = ("--teacher=self", "--data=word_problems:8", TOLD)
    assert abs(plain[0]["train/loss"]) < 1e-12
    seen = run(tmp_path, "b", *told, *SAMPLED, *lora, steps=1)
    assert seen[0]["train/loss"] > 1e-6
    assert seen[0]["train/teacher_tokens"] > plain[0]["train/teacher_tokens"] > 0
    signal = ("--kd_signal=sampled", "--weighting=token")
    sampled = run(tmp_path, "c", *told, *SAMPLED, *signal, *lora, steps=1)
    assert sampled[0]["train/grad_norm"] > 0
    assert sampled[0]["train/teacher_tokens"] == seen[0]["train/teacher_tokens"]


@pytest.mark.parametrize("lora", [(), ("--lora_rank=2",)])
def test_a_run_with_an_average_goes_on_bit_for_bit(lora, tmp_path, undrawn):
    given = ("--teacher=self_average", "--kd_average=0.5", "--data=word_problems:8", TOLD, *SAMPLED)
    given += ("--sample_tokens_start=3", *lora)
    whole = run(tmp_path, "whole", *given)
    kept = tmp_path / "whole" / "checkpoints"
    for step in (3, 4):
        for path in sorted(kept.glob(f"step-{step}")):
            path.rename(tmp_path / path.name)
    again = run(tmp_path, "whole", *given, "--resume")
    timed = ("train/seconds", "train/tokens_per_second", "rollout/seconds")
    for one, other in zip(whole, again, strict=True):
        for name in timed:
            one.pop(name)
            other.pop(name)
    assert again == whole and len({line["train/loss"] for line in whole}) == 4


def test_rl_beside_the_average_that_sees_the_solution(tmp_path, undrawn):
    """Samples that wait for a later update keep what their teacher sees, also in a checkpoint."""
    given = ["--mode=grpo", "--model=tiny-teacher", "--data=word_problems:8", "--grpo_samples=2"]
    given += ["--sample_tokens=4", "--teacher=self_average", "--grpo_kd_coef=0.5", TOLD]
    given += ["--grpo_minibatches_per_rollout=2", "--batch_size=4", "--steps=2", "--warmup=0"]
    given += ["--eval_examples=0", "--dtype=float64", "--save_every=1", f"--runs={tmp_path}"]
    lines = []
    for name in ("r", "r --resume"):
        assert train.main([*given, *f"--name={name}".split()]) == 0
        path = tmp_path / "r" / "metrics.jsonl"
        lines.append([json.loads(line) for line in path.read_text().splitlines()])
        shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-2")
    first, again = lines
    for name in ("train/loss", "train/reverse_kl", "train/grad_norm", "train/teacher_tokens"):
        assert [line[name] for line in first] == [line[name] for line in again], name
    assert first[0]["train/reverse_kl"] > 1e-6
    assert first[1]["train/teacher_tokens"] > first[1]["train/tokens"]


def test_a_teacher_writes_behind_its_own_prompt_and_is_measured(tmp_path, undrawn):
    given = ("--kd_prefix=teacher", "--kd_mix=0.5", "--sample_tokens=4", "--teacher=self", TOLD)
    more = ("--data=word_problems:8", "--eval_examples=4", "--eval_tokens=4", "--lora_rank=2")
    (line,) = [x for x in run(tmp_path, "t", *given, *more, steps=1) if "train/loss" in x]
    assert line["train/teacher_tokens"] > 0


def test_growth_prefix_and_teachers_together(tmp_path, undrawn):
    rows = []
    for number in range(8):
        question = f"Mia has {number} coins. Mia buys {number} coins. How many coins now?"
        row = {"question": question, "answer": f"{number}+{number}={2 * number}. #### {2 * number}"}
        rows.append(row | {"teacher": "ab"[number % 2], "teacher_prompt": f"Go. {question}"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (
        f"--data={path}",
        "--tokenizer=",
        "--teacher=a=random:tiny-teacher,b=random:tiny",
        *SAMPLED,
    )
    lines = run(tmp_path, "r", *given, "--kd_prefix_tokens=2", "--sample_tokens_start=2")
    assert lines[0]["rollout/tokens"] <= 2 < lines[3]["rollout/tokens"] <= 6


# --- a cache of what the student wrote ----------------------------------------------------------


def test_a_cache_of_text_that_the_student_wrote_and_kept(tmp_path, undrawn):
    """Also where it did not stop: nothing is put behind such a text."""
    run(tmp_path, "student", "--data=word_problems:8", "--teacher=random:tiny-teacher", steps=2)
    checkpoint, out = tmp_path / "student" / "checkpoints" / "step-2", tmp_path / "traces"
    wrote = [str(checkpoint), "--data=word_problems:6", "--max_tokens=8", "--temperature=1"]
    assert eval.traces.main([*wrote, "--keep=all", "--n=2", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in (out / "traces.jsonl").read_text().splitlines()]
    assert all(row["messages"][-1].get("truncated") for row in rows) and len(rows) > 6
    tokenizer = toy_tokenizer()
    formatter = Formatter(tokenizer)
    for row in rows:
        (document,) = formatter.documents([to_example(row, "x")])
        written = tokenizer.encode(row["messages"][-1]["content"])
        assert document.tokens[document.completion_start :].tolist() == written
    cached = ("--kd_signal=topk", "--kd_topk=8", f"--kd_cache={tmp_path / 'cache'}")
    given = (f"--data={out / 'traces.jsonl'}", "--teacher=random:tiny-teacher", "--model=tiny")
    filled = run(tmp_path, "filled", *given, *cached, steps=2)
    again = run(tmp_path, "again", *given, *cached, steps=2)
    live = run(tmp_path, "live", *given, *cached[:2], steps=2)
    assert [line["train/loss"] for line in filled] == [line["train/loss"] for line in again]
    for one, other in zip(filled, live, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-2)
