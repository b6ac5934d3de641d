"""launch/: the scripts are run, with stand-ins for what is not here."""

import copy
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from tests import runs

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SHELL = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


def script(path, text):
  """An executable bash file in the place of a real program."""
  path.write_text("#!/usr/bin/env bash\n" + text)
  path.chmod(0o755)
  return path


def start(*argv, **env):
  return subprocess.Popen(
    # A shell's background jobs ignore SIGINT, and so would what they start.
    ["env", "--default-signal=INT", "bash", *map(str, argv)],
    env={**os.environ, **{k: str(v) for k, v in env.items()}},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def wait_for(condition, process, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.05)


def test_everything_is_short():
  for path in LAUNCH.iterdir():
    assert len(path.read_text().splitlines()) <= 80, path.name


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_shellcheck(path):
  tool = pathlib.Path(sys.executable).parent / "shellcheck"
  done = subprocess.run([tool, path], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


# --- local.sh -----------------------------------------------------------------


def test_local_gives_each_process_its_place(tmp_path):
  """The arguments arrive as they are, spaces and all."""
  python = script(
    tmp_path / "python",
    f"""out={tmp_path}/$JAX_PROCESS_ID
    set -- "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$NPROC" "$@"
    printf '%s\\n' "$@" > $out
    """,
  )
  status, output = runs.finish(
    start(LAUNCH / "local.sh", 3, "--workdir", "a b", PYTHON=python)
  )
  assert (status, output) == (0, "")
  lines = [(tmp_path / str(i)).read_text().splitlines() for i in range(3)]
  assert lines[0] == lines[1] == lines[2]
  address, count, cores, *argv = lines[0]
  assert re.fullmatch(r"127\.0\.0\.1:\d{5}", address)
  assert count == "3"
  assert cores == str(max(1, os.cpu_count() // 3))
  assert argv == ["-m", "unet_jax.main", "--workdir", "a b"]


@pytest.mark.parametrize("argv", [[], ["0"], ["--config"]])
def test_local_without_a_number_is_wrong_usage(argv):
  status, output = runs.finish(start(LAUNCH / "local.sh", *argv))
  assert status == 2
  assert "usage" in output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_local_passes_a_signal_on_once_and_waits(tmp_path, signum):
  """Each counts what it gets, and takes its time to save."""
  name = signum.name.removeprefix("SIG")
  python = script(
    tmp_path / "python",
    f"""out={tmp_path}/$JAX_PROCESS_ID
    count=0
    trap 'count=$((count + 1))' {name}
    echo > $out.ready
    while ((!count)); do sleep 0.05; done
    sleep 1
    echo $count > $out.count
    exit {128 + signum}
    """,
  )
  process = start(LAUNCH / "local.sh", 2, PYTHON=python)
  wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2, process)
  process.send_signal(signum)
  status, output = runs.finish(process)
  assert status == 128 + signum, output
  assert [p.read_text() for p in tmp_path.glob("*.count")] == ["1\n", "1\n"]


@pytest.mark.parametrize(
  "deaf", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_local_ends_the_others_of_a_process_that_failed(tmp_path, deaf):
  """Even one that hears no SIGTERM; the status is that of the first."""
  python = script(
    tmp_path / "python",
    f"""if ((JAX_PROCESS_ID == 1)); then exit 7; fi
    echo $$ > {tmp_path}/pid
    {"trap '' TERM" if deaf else ""}
    while :; do sleep 0.1; done
    """,
  )
  begin = time.monotonic()
  process = start(LAUNCH / "local.sh", 2, PYTHON=python, GRACE=2)
  status, output = runs.finish(process, timeout=60)
  assert status == 7, output
  assert time.monotonic() - begin >= 1
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
def test_local_really_trains_on_two_processes_and_resumes(tmp_path):
  """Two processes of two devices; stopped by SIGTERM and started again."""
  argv = [
    *(LAUNCH / "local.sh", 2, "--config", "configs/synthetic.py"),
    *("--workdir", tmp_path),
    *("--config.model.widths=2,4", "--config.data.synthetic_size=16"),
    *("--config.data.crop_size=16", "--config.data.synthetic_train=20"),
    *("--config.data.synthetic_val=5", "--config.train.log_every=1"),
    *("--config.train.eval_every=20", "--config.train.num_steps=40"),
  ]
  env = {
    "PYTHON": sys.executable,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": runs.xla_flags(devices=2),
  }
  metrics = tmp_path / "metrics.jsonl"
  process = start(*argv, **env)
  wait_for(lambda: metrics.exists() and metrics.read_text(), process, 180)
  process.terminate()
  status, output = runs.finish(process)
  assert status == 143, output
  assert "the state was saved" in output
  status, output = runs.finish(start(*argv, **env))
  assert status == 0, output
  assert "resumed from step" in output
  environment = json.loads((tmp_path / "env.json").read_text())
  assert environment["process_count"] == 2
  assert environment["device_count"] == 4
  steps = [r["step"] for r in runs.read_metrics(tmp_path)]
  train = [s for s in steps if steps.count(s) == 1 or s % 20]
  assert train == [s for s in range(1, 40) if s % 20], "no line twice, or lost"
  assert (tmp_path / "checkpoints" / "40").is_dir()


# --- slurm.sbatch -------------------------------------------------------------


def slurm(tmp_path, srun):
  """Starts the batch script with stand-ins that log how they are called."""
  tools = tmp_path / "bin"
  tools.mkdir()
  script(tools / "srun", f'echo "$@" > {tmp_path}/srun\n{srun}\n')
  # What SLURM does with it: SIGTERM to the tasks.
  script(
    tools / "scancel",
    f'echo "$@" > {tmp_path}/scancel\nkill -TERM "$(cat {tmp_path}/task)"\n',
  )
  script(tools / "scontrol", f'echo "$@" > {tmp_path}/scontrol\n')
  path = f"{tools}:{os.environ['PATH']}"
  argv = [LAUNCH / "slurm.sbatch", "--workdir", "W"]
  return start(*argv, PATH=path, SLURM_JOB_ID=17, PYTHON="py")


def test_slurm_asks_for_one_task_a_node_and_to_be_requeued():
  text = (LAUNCH / "slurm.sbatch").read_text()
  options = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
  assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append"} <= {
    *options
  }
  # sbatch reads its options only before the first command.
  assert text.rindex("\n#SBATCH") < text.index("\nset -e")


@pytest.mark.parametrize("wanted", [0, 2, 143])
def test_slurm_ends_as_the_run_does(tmp_path, wanted):
  """Also 143: somebody cancelled it, so it must not come back."""
  status, output = runs.finish(slurm(tmp_path, f"exit {wanted}"))
  assert status == wanted, output
  assert (
    (tmp_path / "srun")
    .read_text()
    .endswith("py -m unet_jax.main --workdir W\n")
  )
  assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("wanted", [0, 143])
def test_slurm_near_its_time_saves_and_queues_again(tmp_path, wanted):
  """Not where the run was done by then."""
  process = slurm(
    tmp_path,
    f"""trap 'sleep 0.5; exit {wanted}' TERM
    echo $$ > {tmp_path}/task.new
    mv {tmp_path}/task.new {tmp_path}/task
    while :; do sleep 0.05; done""",
  )
  wait_for((tmp_path / "task").exists, process)
  process.send_signal(signal.SIGUSR1)
  status, output = runs.finish(process)
  assert status == wanted, output
  assert (tmp_path / "scancel").read_text() == "--signal=TERM 17\n"
  requeued = (tmp_path / "scontrol").exists()
  assert requeued == (wanted == 143)
  if requeued:
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


# --- tpu_pod.sh ---------------------------------------------------------------


ARGV = ("--config", "configs/synthetic.py", "--config.data.name=a b")
ORDER = ["create", "scp", "ssh", "ssh", "rsync", "delete"]


def tpu_pod(tmp_path, *argv, gcloud="", **env):
  """(status, what was printed, every call of gcloud as a list of words)."""
  tools = tmp_path / "bin"
  tools.mkdir()
  log = tmp_path / "log"
  script(tools / "gcloud", f'printf "%s\\0" "$@" END >> {log}\n{gcloud}\n')
  env = {"PATH": f"{tools}:{os.environ['PATH']}", **env}
  env = {"WORKDIR": "gs://bucket/run", "RESULTS": tmp_path / "results", **env}
  status, output = runs.finish(start(LAUNCH / "tpu_pod.sh", *argv, **env))
  text = log.read_text() if log.exists() else ""
  calls = [call.split("\0")[:-1] for call in text.split("END\0")[:-1]]
  return status, output, calls


def verbs(calls):
  return [next(w for w in call if w in ORDER) for call in calls]


def check_commands(calls, tmp_path):
  create, scp, install, train, rsync, delete = calls
  assert verbs(calls) == ORDER
  name = create[4]
  assert re.fullmatch(r"unet-jax-\d{8}-\d{6}", name)
  assert "--spot" in create
  assert "--accelerator-type=v5litepod-16" in create
  for call in (scp, install, train):
    assert "--worker=all" in call
  assert scp[5] == f"{name}:"
  for call in (install, train, delete):
    assert call[4] == name
  for call in (create, scp, install, train, delete):
    assert call[:3] == ["compute", "tpus", "tpu-vm"]
    assert "--zone=us-west4-a" in call
  assert "--quiet" in delete
  assert rsync[-2:] == ["gs://bucket/run", str(tmp_path / "results")]
  (command,) = [w for w in train if w.startswith("--command=")]
  remote = shlex.split(command.removeprefix("--command="))
  words = [".venv/bin/python", "-m", "unet_jax.main", *ARGV]
  assert remote == ["cd", "unet_jax", "&&", *words, *WORKDIR]


WORKDIR = ("--workdir", "gs://bucket/run")


def test_tpu_pod_runs_collects_and_deletes(tmp_path):
  status, output, calls = tpu_pod(tmp_path, *ARGV)
  assert status == 0, output
  check_commands(calls, tmp_path)


def test_tpu_pod_dry_run_prints_every_command_and_runs_none(tmp_path):
  status, output, calls = tpu_pod(tmp_path, "--dry-run", *ARGV)
  assert (status, calls) == (0, [])
  # As a shell reads them: what is printed can be typed.
  words = shlex.split(output.replace("$'", "'"))
  starts = [i for i, word in enumerate(words) if word == "gcloud"]
  ends = [*starts[1:], len(words)]
  printed = [words[i + 1 : j] for i, j in zip(starts, ends, strict=True)]
  check_commands(printed, tmp_path)
  assert words[:3] == ["git", "bundle", "create"]


@pytest.mark.parametrize("verb", ["create", "scp", "ssh"])
def test_tpu_pod_that_fails_is_deleted_and_keeps_its_status(tmp_path, verb):
  fail = f'[[ "$4" == {verb} ]] && exit 43; exit 0'
  status, output, calls = tpu_pod(tmp_path, *ARGV, gcloud=fail)
  assert status == 43, output
  done = verbs(calls)
  assert done == [*ORDER[: ORDER.index(verb) + 1], "rsync", "delete"]


def test_tpu_pod_tells_of_a_slice_that_it_could_not_delete(tmp_path):
  fail = '[[ "$4" == delete || $1 == storage ]] && exit 1; exit 0'
  status, output, calls = tpu_pod(tmp_path, *ARGV, gcloud=fail)
  assert status == 0, "the run was fine"
  assert f"delete {calls[0][4]} by hand!" in output.splitlines()[-1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_tpu_pod_interrupted_deletes_the_slice_at_once(tmp_path, signum):
  """The signal comes while the run is under way, and the run does not end."""
  name = signum.name.removeprefix("SIG")
  hang = f"""case "$*" in *unet_jax.main*)
    kill -{name} $PPID
    exec sleep 100;;
  esac"""
  begin = time.monotonic()
  status, output, calls = tpu_pod(tmp_path, *ARGV, gcloud=hang)
  assert status == 128 + signum, output
  assert verbs(calls) == ORDER
  assert time.monotonic() - begin < 50


def test_tpu_pod_needs_a_bucket(tmp_path):
  status, output, calls = tpu_pod(tmp_path, *ARGV, WORKDIR="")
  assert status != 0
  assert calls == []
  assert "gs://" in output


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_what_is_copied_can_be_cloned(tmp_path):
  """The bundle, with the words of the script, as a worker unpacks it."""
  clone = tmp_path / "home"
  clone.mkdir()
  unpack = f'[[ "$4" == scp ]] && git -C {clone} clone -q "$5" unet_jax; exit 0'
  status, output, _ = tpu_pod(tmp_path, *ARGV, gcloud=unpack)
  assert status == 0, output
  assert (clone / "unet_jax" / "unet_jax" / "main.py").exists()


# --- gke_jobset.yaml ----------------------------------------------------------


@pytest.fixture
def jobset():
  return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def validate(jobset):
  path = pathlib.Path(__file__).parent / "jobset_schema.json"
  jsonschema.Draft202012Validator(json.loads(path.read_text())).validate(jobset)


def parts(jobset):
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  return job, pod, pod["containers"][0]


def test_jobset_fits_the_schema(jobset):
  validate(jobset)


def test_jobset_asks_for_all_chips_of_its_slice(jobset):
  job, pod, container = parts(jobset)
  key = "cloud.google.com/gke-tpu-"
  assert pod["nodeSelector"][key + "accelerator"] == "tpu-v5-lite-podslice"
  sides = map(int, pod["nodeSelector"][key + "topology"].split("x"))
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert container["resources"]["requests"]["google.com/tpu"] == chips
  assert job["parallelism"] == job["completions"]
  assert job["parallelism"] * chips == math.prod(sides)


def test_jobset_restarts_all_but_a_mistake(jobset):
  """A pod that fails fails its job; status 2 fails the set for good."""
  job, pod, container = parts(jobset)
  assert pod["restartPolicy"] == "Never"
  assert job["backoffLimit"] == 0
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert rule["onExitCodes"]["values"] == [2]
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] > 0
  assert policy["rules"][0]["action"] == "FailJobSet"
  assert container["command"] == ["python", "-m", "unet_jax.main"]


MUTATIONS = {
  "a misspelled field": lambda s, j, p, c: s.update(replicatedJob=[]),
  "no container": lambda s, j, p, c: p.pop("containers"),
  "an unknown action": lambda s, j, p, c: s["failurePolicy"]["rules"][0].update(
    action="Retry"
  ),
  "a number for a string": lambda s, j, p, c: p["nodeSelector"].update(spot=1),
  "restarts as text": lambda s, j, p, c: s["failurePolicy"].update(
    maxRestarts="20"
  ),
  "a job without a pod": lambda s, j, p, c: j.pop("template"),
  "a chip count in words": lambda s, j, p, c: c["resources"]["limits"].update(
    {"google.com/tpu": "four"}
  ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_jobset_that_does_not_fit_is_refused(jobset, name):
  wrong = copy.deepcopy(jobset)
  MUTATIONS[name](wrong["spec"], *parts(wrong))
  with pytest.raises(jsonschema.ValidationError):
    validate(wrong)
