"""Functions that run in a forked process of their own: to be killed, to be refused, to fill a disk."""

import os
import sys
import traceback

from ldm.errors import LdmError

FAILED = 70


def in_child(work):
    """Run `work` in a forked process and return its id; `status_of` waits for its end.

    Its exit status is what `work` returns if that is a number, else 0; an LdmError's exit code; 70 for another error.
    """
    pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # threads do not outlive a fork
        answer = work()
        status = answer if isinstance(answer, int) else 0
    except LdmError as error:
        status = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(pid):
    """Wait for a child's end: its exit status, or less the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
