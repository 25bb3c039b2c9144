"""From files or tasks to examples to documents to a deterministic, resumable stream of batches.

Public forms that are understood (one JSON object per line, a JSON list, or Parquet rows): GSM8K (`question`, `answer` whose
last line is `#### 42`), any other `question` and `answer`, MATH (`problem`, `solution`, `answer`), HumanEval (`canonical_solution`, …), MBPP
(`code`, `test_list`, …), traces of CAMEL (`problem`, `reasoning_solution`, as in camel-ai/gsm8k_distilled), chat (`messages`), plain
(`prompt`, `completion`).
"""

import dataclasses
import gzip
import json
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.batch import Batch, Document
from data.code import humaneval, mbpp, split_of
from data.tasks import TASKS, Example
from errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")  # the last: .jsonl.gz
GSM8K_GOLD = re.compile(r"(?:^|\n)#### *([-+]?\$?[\d,]*\.?\d+%?\.?)\s*\Z")
GSM8K_CALCULATION = re.compile(r"<<[\d+\-*/().% ]+=[\d+\-*/().=% ]+>>")  # annotations for a calculator, no part of the text
CAMEL_BOX = re.compile(r"\\boxed\{(\d+)\}")  # CAMEL's GSM8K has it for `#### 42`, around the first digits alone: `\boxed{1},600`
REDRAWS = 1000  # attempts at a problem of an endless task that is not overlong
SPLIT_SEED = 0  # which examples are kept for validation does not depend on a run's seed


# --- files -> examples ---------------------------------------------------------------------------------------------


def find_file(name):
    """`--data` as a file: a path, a folder with one data file or a train.*, or `org/name/path.jsonl` of a hub dataset."""
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        train = [p for p in found if p.stem.split("-")[0] == "train"]
        if len(train or found) == 1:
            return (train or found)[0]
        listing = ", ".join(p.name for p in found) or "no .jsonl, .json or .parquet file"
        raise UserError(f"--data {name}: which file of the folder? It has {listing}")
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise UserError(f"--data {name}: a data file ends in {', '.join(SUFFIXES)}")
        return path
    owner, *rest = name.split("/")
    if len(rest) >= 2 and Path(name).suffix in SUFFIXES and owner not in ("", ".", "..", "~"):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(f"{owner}/{rest[0]}", "/".join(rest[1:]), repo_type="dataset"))
        except Exception as e:
            raise UserError(f"--data {name}: neither a local file nor a hub dataset file ({type(e).__name__})") from None
    raise UserError(f"--data {name}: no such file or folder, and no task of that name ({', '.join(t for t in TASKS if TASKS[t].make)})")


def read_rows(path):
    """Yields (origin, row) for every row; origin is `file:line`, for errors."""
    try:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                rows = pyarrow.parquet.read_table(path).to_pylist()
            except pyarrow.ArrowInvalid as e:
                raise UserError(f"{path}: not a Parquet file ({str(e).splitlines()[0]})") from None
            yield from ((f"{path}:row {i}", row) for i, row in enumerate(rows, 1))
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise UserError(f"{path}: a .json data file holds one list of objects; use .jsonl for one object per line")
            yield from ((f"{path}:item {i}", row) for i, row in enumerate(rows, 1))
        else:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        try:
                            yield f"{path}:{number}", json.loads(line)
                        except ValueError as e:
                            raise UserError(f"{path}:{number}: not valid JSON ({e})") from None
    except (ValueError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a gzip file, or cut off ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None


def read_examples(path, split):
    """The examples of a file; of rows that belong to a split by their data set's own rules those of "train" or of "test"."""
    rows = list(read_rows(path))
    kept = [(origin, row) for origin, row in rows if not isinstance(row, dict) or split_of(row) in (None, split)]
    if rows and not kept:
        raise UserError(f"{path}: none of its {len(rows):,} rows is for {split} (HumanEval: test; MBPP: ids 601 to 974 train, 11 to 510 test)")
    return [to_example(row, origin) for origin, row in kept]


def to_example(row, origin):
    """A row of any public form as an Example. Raises UserError naming the row."""
    example = _example(row, origin)
    for text in (example.answer or "", *(part for m in example.messages for part in (m["role"], m["content"]))):
        check_text(text, origin)
    return example


def check_text(text, origin):
    """JSON and command lines can hold halves of characters, which no tokenizer takes and no file keeps."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{origin}: {text[e.start]!a} is half a character (a lone surrogate); mend or drop that text") from None


def _example(row, origin):
    if not isinstance(row, dict):
        raise UserError(f"{origin}: expected an object, found {type(row).__name__}")
    keys = set(row)
    for name, read, needed in (("humaneval", humaneval, {"prompt", "canonical_solution", "test"}), ("mbpp", mbpp, {"code", "test_list"})):
        if needed <= keys:
            question, solution, tests = read(row, origin)
            return Example(_turns(question, solution), tests, name, origin)
    if {"question", "answer"} <= keys:
        _texts(row, origin, "question", "answer")
        gold = GSM8K_GOLD.search(row["answer"])
        if not gold:
            return Example(_turns(row["question"], row["answer"]), None, "", origin)
        return Example(_turns(row["question"], GSM8K_CALCULATION.sub("", row["answer"])), gold[1], "gsm8k", origin)
    if {"problem", "reasoning_solution"} <= keys:  # every trace is kept, right or wrong, as is; the misspelt name is CAMEL's
        _texts(row, origin, "problem", "reasoning_solution")
        gold = GSM8K_GOLD.search(CAMEL_BOX.sub(r"#### \1", str(row.get("groud_truth_solution"))))
        return Example(_turns(row["problem"], row["reasoning_solution"]), gold and gold[1], "gsm8k" if gold else "", origin)
    if {"problem", "solution"} <= keys:
        _texts(row, origin, "problem", "solution")
        answer = row.get("answer")
        return Example(_turns(row["problem"], row["solution"]), None if answer is None else str(answer), "math", origin)
    if "messages" in keys:
        messages = row["messages"]
        ok = isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
        )
        if not ok or messages[-1]["role"] != "assistant":
            raise UserError(f"{origin}: messages must be a list of {{role, content}} texts that ends with the assistant's")
        answer, task = row.get("answer"), row.get("task")
        return Example(tuple(messages), None if answer is None else str(answer), task if task in TASKS else "", origin)
    if {"prompt", "completion"} <= keys:
        _texts(row, origin, "prompt", "completion")
        answer = row.get("answer")
        return Example(_turns(row["prompt"], row["completion"]), None if answer is None else str(answer), "", origin)
    raise UserError(
        f"{origin}: keys {sorted(keys)} fit no known form (question+answer, problem+solution, problem+reasoning_solution, messages, prompt+completion, "
        "HumanEval, MBPP)"
    )


def _texts(row, origin, *keys):
    for key in keys:
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{origin}: {key!r} must be a text that is not empty")


def _turns(user, assistant):
    return ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})


# --- examples -> documents -----------------------------------------------------------------------------------------


class Formatter:
    """Examples as token ids: the chat template, or plain text. Prompt and completion are tokenised apart, as in generation."""

    def __init__(self, tokenizer, template="auto", system_prompt="", prompt_suffix=""):
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        self.tokenizer, self.chat = tokenizer, template == "chat"
        self.end = tokenizer.turn_end if self.chat else tokenizer.eos
        self.system_prompt, self.prompt_suffix = system_prompt, prompt_suffix
        check_text(system_prompt, "--system_prompt")
        check_text(prompt_suffix, "--prompt_suffix")

    def segments(self, example):
        """[(text, trained)]: every assistant turn and the token that ends it are trained, the rest is not."""
        messages = [dict(m) for m in example.messages]
        user = next((m for m in reversed(messages) if m["role"] == "user"), None)
        if user and self.prompt_suffix:
            user["content"] += self.prompt_suffix
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if not self.chat:
            *before, last = messages
            return [("".join(m["content"] for m in before), False), (last["content"] + self.end, True)]
        parts, so_far = [], ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.tokenizer.render(messages[:i], generate=True)
                if not prompt.startswith(so_far):
                    raise UserError(f"{example.origin}: the chat template rewrites earlier turns; split the conversation")
                parts += [(prompt[len(so_far) :], False), (message["content"] + self.end, True)]
                so_far = prompt + message["content"] + self.end
        return parts

    def prompt(self, example):
        """Ids that a model is given to answer `example`."""
        *before, _ = self.segments(example)
        return [i for text, _ in before for i in self.tokenizer.encode(text)]

    def documents(self, examples):
        """Documents in the examples' order."""
        segments = [self.segments(e) for e in examples]
        ids = iter(self.tokenizer.encode_many([text for parts in segments for text, _ in parts]))
        result = []
        for parts in segments:
            pieces = [(next(ids), trained) for _, trained in parts]
            tokens = np.array([i for piece, _ in pieces for i in piece], np.int32)
            weights = np.array([float(trained) for piece, trained in pieces for _ in piece], np.float32)
            weights[:1] = 0  # nothing predicts the first token
            result.append(Document(tokens, weights))
        return result


# --- documents -> batches ------------------------------------------------------------------------------------------


def task_of(name):
    """The task that `--data name` or `--data name:count` asks for, or None: a file."""
    task = name.partition(":")[0]
    return task if task in TASKS and TASKS[task].make else None


def divide(path, eval_examples, train_examples=0):
    """(held-out examples, those to train on) of a file: the same ones for every seed, the first `train_examples` of them (0: all)."""
    examples = read_examples(path, "train")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    held_out, rest = order[:eval_examples], order[eval_examples:][: train_examples or None]
    return [examples[i] for i in held_out], [examples[i] for i in rest]


class Dataset:
    """Training documents by index, and held-out examples. Length None: endless, made on demand."""

    def __init__(self, name, formatter, *, seed, max_tokens, vocab, eval_examples=0, train_examples=0, overlong="error", progress=False):
        self.name, self.formatter, self.seed = name, formatter, seed
        self.max_tokens, self.vocab, self.overlong = max_tokens, vocab, overlong
        task, _, count = name.partition(":")
        self.task = task_of(name)
        self.dropped, self._documents, self._examples, self.listed = 0, None, None, None
        if self.task:
            self.label = task
            if count and not (count.isdigit() and int(count)):
                raise UserError(f"--data {name}: write {task} for an endless supply or {task}:1000 for its first 1,000 problems")
            self.held_out = [TASKS[task].example(task, "heldout", f"{SPLIT_SEED}/{i}") for i in range(eval_examples)]
            if count or train_examples:
                n = min(int(n) for n in (count, train_examples) if n)
                self._tokenise([TASKS[task].example(task, "train", f"{SPLIT_SEED}/{i}") for i in range(n)], progress)
            else:
                self.get(0)  # what is wrong with every problem is wrong with the first
        else:
            path = find_file(name)
            self.held_out, training = divide(path, eval_examples, train_examples)
            first = next(iter([*self.held_out, *training]), None)
            self.label = first and (first.task or path.stem)
            if not training:
                raise UserError(f"--data {name} has {len(self.held_out)} examples; --eval_examples {eval_examples} leaves none to train on")
            self._tokenise(training, progress)
        self._held_out_documents = self._checked(self.held_out)

    def __len__(self):
        return 0 if self._documents is None else len(self._documents)

    def get(self, index):
        document = self._documents[index] if self._documents is not None else self._draw(index)[1]
        return dataclasses.replace(document, listed=self.listed[index]) if self.listed else document

    def example(self, index):
        """What `get` makes a document of; its last message is the gold answer."""
        return self._examples[index] if self._examples is not None else self._draw(index)[0]

    def _draw(self, index):
        """(example, document) of an endless task: the first that is not dropped, of a fixed sequence for this index."""
        for key in (f"{self.seed}/{index}", *(f"{self.seed}/{index}/redraw-{n}" for n in range(1, REDRAWS))):
            example = TASKS[self.task].example(self.task, "train", key)
            if documents := self._checked([example]):
                return example, documents[0]
        raise UserError(f"--data {self.name}: {REDRAWS:,} problems in a row are longer than --micro_tokens {self.max_tokens:,}; raise it")

    def need_answers(self, unless):
        """Refuse to be rewarded for what cannot be graded (unless a function of the user's own does it)."""
        bad = [] if unless else [e for e in self._examples or () if e.answer is None or e.task not in TASKS]
        if bad:
            raise UserError(f"{bad[0].origin}: no answer that a grader knows ({len(bad):,} such); give --grpo_reward file.py:function")

    def need_room(self, new_tokens):
        """Refuse prompts that leave less than `new_tokens` for an answer."""
        documents = self._documents or [self.get(0), *self._held_out_documents]
        longest = max(int((d.weights != 0).argmax()) for d in documents)
        if longest + new_tokens > self.max_tokens:
            raise UserError(f"--sample_tokens {new_tokens} and the longest prompt ({longest}) do not fit --micro_tokens {self.max_tokens}; raise it")

    def held_out_documents(self):
        return self._held_out_documents

    def _tokenise(self, examples, progress):
        self._documents, self._examples, step = [], [], 2000
        for lo in range(0, len(examples), step):
            self._documents += self._checked(examples[lo : lo + step], self._examples)
            if progress and len(examples) > 5 * step:
                print(f"\rtokenising {min(lo + step, len(examples)):,}/{len(examples):,}", end="", file=sys.stderr, flush=True)
        if progress and len(examples) > 5 * step:
            print(file=sys.stderr)
        if not self._documents:
            raise UserError(f"--data {self.name}: no example is left to train on")

    def _checked(self, examples, kept_examples=None):
        """Their documents, less those that are too long (or an error); kept_examples gets the examples that stay."""
        documents = self.formatter.documents(examples)
        kept = []
        for example, d in zip(examples, documents):
            if len(d) and d.tokens.max() >= self.vocab:
                raise UserError(f"{example.origin}: token id {d.tokens.max()} is outside the {self.vocab:,} ids that the models share")
            if len(d) <= self.max_tokens:
                kept.append(d)
                if kept_examples is not None:
                    kept_examples.append(example)
            elif self.overlong == "error":
                raise UserError(
                    f"{example.origin}: {len(d):,} tokens, more than --micro_tokens {self.max_tokens:,}; raise it or set --overlong drop"
                )
        self.dropped += len(documents) - len(kept)
        return kept


class Stream:
    """Endless global batches of `batch_size` documents; this rank gets its share. The next one is made while a step runs.

    Batch k holds positions k·batch_size … of the concatenated epochs, each a permutation drawn from (seed, epoch): what a
    step trains on depends on (seed, step) alone, not on the number of ranks. `state` counts what was consumed, not fetched.
    """

    def __init__(self, dataset, batch_size, seed, weighting, rank=0, world=1):
        self.dataset, self.batch_size, self.seed, self.weighting = dataset, batch_size, seed, weighting
        self.rank, self.world, self.consumed = rank, world, 0
        self._worker, self._next = ThreadPoolExecutor(1), None
        self._order = Order(len(dataset), seed)

    def __iter__(self):
        return self

    def __next__(self):
        batch = (self._next or self._worker.submit(self._make, self.consumed)).result()
        self.consumed += 1
        self._next = self._worker.submit(self._make, self.consumed)
        return batch

    def state(self):
        return {"consumed": self.consumed}

    def load(self, state):
        self.consumed, self._next = state["consumed"], None

    def close(self):
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _make(self, k):
        positions = range(k * self.batch_size + self.rank, (k + 1) * self.batch_size, self.world)
        return Batch.pack(self.weighting(self.dataset.get(self._order(p))) for p in positions)


class Order:
    """position -> index: epochs of `size` examples, each a permutation drawn from (seed, epoch); size 0: endless, as they come."""

    def __init__(self, size, seed):
        self.size, self.seed, self._epoch = size, seed, (-1, None)

    def __call__(self, position):
        if not self.size:
            return position
        epoch, offset = divmod(position, self.size)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size))
        return int(self._epoch[1][offset])
