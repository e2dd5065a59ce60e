"""What ranks tell the batch script that started them (`templates/`): one number in one file.

torchrun ends with 1 whatever its ranks ended with, and its agents take every other code for a
crash that new ranks may mend. So rank 0 writes the code that counts into the file that
GATEWISE_OUTCOME names, and ranks whose end a restart cannot change end with 0. The file with 85
appears after the save is durable; the script then asks the batch system for another start.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

from gatewise.launch.session import EXIT_CONFIG, EXIT_OK, EXIT_REQUEUE
from gatewise.launch.signals import Postman, StopSignals
from gatewise.launch.world import Place
from gatewise.parallel.errors import ConfigError

__all__ = ["OUTCOME", "answer_script"]

OUTCOME = "GATEWISE_OUTCOME"
_FINAL = (EXIT_OK, EXIT_CONFIG, EXIT_REQUEUE)  # another start at once would end alike


def answer_script(body: Callable[[], int], place: Place) -> int:
    """Run a rank's command and report its exit code to the script, where there is one.

    Signals that come before the trainer listens are kept for it, so that a stop still saves. When
    the launcher is killed this process ends too, and with it its hold on the run's folder.

    Args:
        body: returns the exit code.
        place: of this rank.

    Returns:
        The exit code for the launcher.

    Raises:
        ConfigError: of the body, where no script waits for an answer.
    """
    path = os.environ.get(OUTCOME)
    if path is None:
        return body()
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    postman = Postman()
    try:
        with StopSignals(postman.deliver):
            code = body()
    except ConfigError:
        if place.rank:
            return EXIT_OK  # rank 0 says it
        _write(path, EXIT_CONFIG)
        raise
    finally:
        postman.cancel()
    if place.rank == 0 and code in _FINAL:
        _write(path, code)
    return EXIT_OK if code in _FINAL else code


def _end_with_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _write(path: str, code: int) -> None:
    """Write the code so that it outlives the machine, before this process ends."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="ascii") as stream:
        stream.write(f"{code}\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
