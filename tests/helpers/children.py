"""Child processes of a test: cheaper than new interpreters, since they have imported everything, and as mortal."""

import os


def fork(work) -> int:
    """Runs ``work()`` in a child process, without output, and returns its id. Its status is what ``work`` returns, or 1 if it raises."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(work() or 0)
    except BaseException:
        os._exit(1)


def status(child: int) -> int:
    """Waits for a child: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
