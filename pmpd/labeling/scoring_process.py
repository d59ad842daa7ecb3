"""A process that scores rows beside one that decodes: `python -m pmpd.labeling.scoring_process`.

Scoring is Python. In a thread of the decoding process it takes the interpreter away between a GPU's steps,
and the GPU waits. The two talk over pipes: a pickled scorer, then one pickled row after the other. The
process ends with its standard input, so it never outlives who started it, however that ends, and whatever its
rule is at.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from pmpd.errors import UserError
from pmpd.labeling.scoring import PairBranches, RowScorer

TRIES = 2
"""Processes for a row: one that was killed was not to blame for it."""

LEAVE_SECONDS = 1.0
"""For the row that a process is at when its standard input ends."""


class ScoringProcess:
    """A `Score` that runs `scorer` in a process of its own. One call at a time."""

    def __init__(self, scorer: RowScorer) -> None:
        """UserError: another process can't have the rule's function."""
        try:
            self._scorer = pickle.dumps(pickle.dumps(scorer))  # bytes can always be read
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"--rule {scorer.config.rule.name}: on a GPU rows are scored in a process of their own, "
                f"which can't be given this rule ({error}); make its score a function of a module"
            ) from error
        self._process = self._started()

    def __call__(
        self, row: Mapping[str, Any], reference: Mapping[str, Any], decoded: Sequence[PairBranches]
    ) -> dict[str, Any]:
        """RuntimeError: the process ended twice over this row. What the scorer raises is raised here; as a
        RuntimeError where it can't be brought here."""
        question = pickle.dumps(pickle.dumps((row, reference, decoded)))
        for _ in range(TRIES):
            with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
                answer = pickle.loads(self._ask(question))
                break
            if not self._end.alive:
                raise RuntimeError("the interpreter ends, and the process that scores rows with it")
            self._end()
            self._process = self._started()
        else:
            raise RuntimeError(f"the process that scores rows ended {TRIES} times over one row")
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C is for who started it
        )
        self._end = weakref.finalize(self, _end, process)
        self._told = False
        return process

    def _ask(self, question: bytes) -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if not self._told:  # it takes seconds to start, and more fits into no pipe before
            stdin.write(self._scorer)
            self._told = True
        stdin.write(question)
        stdin.flush()
        return pickle.load(stdout)


class ScoringProcesses:
    """A `Score` that several threads may call at a time, as many as there are processes."""

    def __init__(self, scorer: RowScorer, count: int) -> None:
        self._free: SimpleQueue[ScoringProcess] = SimpleQueue()
        for _ in range(count):
            self._free.put(ScoringProcess(scorer))

    def __call__(
        self, row: Mapping[str, Any], reference: Mapping[str, Any], decoded: Sequence[PairBranches]
    ) -> dict[str, Any]:
        """As `ScoringProcess`; waits for one that is free."""
        process = self._free.get()
        try:
            return process(row, reference, decoded)
        finally:
            self._free.put(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(5 * LEAVE_SECONDS)
    except subprocess.TimeoutExpired:  # in code that lets no thread of Python run
        process.kill()
        process.wait()
    process.stdout.close()


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not be taken for an answer
    questions: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    scorer: RowScorer | None = None
    try:
        scorer = pickle.loads(questions.get() or b"")
    except Exception as error:  # of a rule that this process can't import; told with the first row
        problem = error
    while (question := questions.get()) is not None:
        row, reference, decoded = pickle.loads(question)
        try:
            answer: Any = problem if scorer is None else scorer(row, reference, decoded)
        except BaseException as error:  # SystemExit too
            answer = error
        try:
            pickle.dump(_sendable(answer), answers)  # as bytes, so that the next answer begins behind it
            answers.flush()
        except BrokenPipeError:  # nobody waits for it any more
            os._exit(1)


def _read(questions: SimpleQueue[bytes | None]) -> None:
    """Puts what comes, and None at its end; then ends a process that does not end by itself."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):  # the latter in the middle of a question
        while True:
            questions.put(pickle.load(sys.stdin.buffer))
    questions.put(None)
    questions.put(None)  # one in place of a scorer that never came
    time.sleep(LEAVE_SECONDS)
    os._exit(1)


def _sendable(answer: Any) -> bytes:
    """`answer` pickled; where it, or an exception, could not be read again, what there is to say of that."""
    try:
        content = pickle.dumps(answer)
        if isinstance(answer, BaseException):
            pickle.loads(content)
    except Exception as error:
        of = answer if isinstance(answer, BaseException) else error
        return pickle.dumps(RuntimeError(f"{type(of).__name__}: {of}"))
    if isinstance(answer, BaseException) and not isinstance(answer, Exception):
        return pickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
    return content


if __name__ == "__main__":
    main()
