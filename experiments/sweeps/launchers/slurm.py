"""Tasks as SLURM arrays: one array for each depth of the graph, each waiting for the one before.

The arrays wait with `afterany`: a task whose predecessor failed says so and ends, the others go on.
The same command again submits what is not done.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments.sweeps.definition import Resources
from experiments.sweeps.graph import SweepPlan, depth
from odvla.errors import UserError
from odvla.weights import write_atomically


def write_script(
    plan: SweepPlan, command: Sequence[str], resources: Resources, options: Sequence[str] = ()
) -> Path:
    """Write the script that submits every task that is not done yet.

    Args:
        plan: the sweep.
        command: that does a task, less the task's name.
        resources: of one task.
        options: further options of sbatch, e.g. --partition=gpu.

    Returns:
        <sweep>/slurm/submit.sh; beside it lists of tasks, one a depth.

    Raises:
        UserError: every task is done.
    """
    folder = plan.folder / "slurm"
    waiting = [task for task in plan.tasks if not plan.is_done(task)]
    if not waiting:
        raise UserError(f"sweep {plan.sweep.name!r} is finished: there is nothing to submit")
    levels: dict[int, list[str]] = {}
    for task in waiting:
        levels.setdefault(depth(plan, task), []).append(task.id)
    wanted = [f"--cpus-per-task={resources.cpus}"]
    if resources.gpus:
        wanted.append(f"--gpus-per-task={resources.gpus:g}")
    lines = ["#!/bin/bash", "set -eu", f"cd {shlex.quote(str(Path.cwd()))}", "before="]
    for level, names in sorted(levels.items()):
        listed = folder / f"tasks-{level}.txt"
        write_atomically(listed, "".join(f"{name}\n" for name in names).encode())
        job = folder / f"level-{level}.sh"
        write_atomically(job, _job(listed, command).encode())
        arguments = [
            f"--job-name={plan.sweep.name}-{level}",
            f"--array=1-{len(names)}",
            f"--output={folder.resolve()}/%x-%A-%a.log",
            "--ntasks=1",
            *wanted,
            *options,
        ]
        lines.append(
            f"before=$(sbatch --parsable ${{before:+--dependency=afterany:$before}} "
            f"{shlex.join(arguments)} {shlex.quote(str(job.resolve()))})"
        )
        lines.append(f'echo "level {level}: {len(names)} tasks, job $before"')
    script = folder / "submit.sh"
    write_atomically(script, ("\n".join(lines) + "\n").encode())
    script.chmod(0o755)
    return script


def submit(script: Path) -> str:
    """Run the script.

    Returns:
        What it printed.

    Raises:
        UserError: there is no SLURM here, or it refused.
    """
    require_slurm(script)
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"sbatch refused {script}: {said[-1] if said else done.returncode}")
    return done.stdout


def require_slurm(script: Path | None = None) -> None:
    """Check that sbatch is there.

    Raises:
        UserError: it is not.
    """
    if shutil.which("sbatch") is None:
        where = f"; the script is at {script}" if script else ""
        raise UserError(f"the slurm launcher needs sbatch, which this machine does not have{where}")


def _job(listed: Path, command: Sequence[str]) -> str:
    """The script of one array: element n does the n-th task of the list."""
    return (
        "#!/bin/bash\n"
        "set -eu\n"
        f'task=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(listed.resolve()))})\n'
        f'exec {shlex.join(command)} "$task"\n'
    )
