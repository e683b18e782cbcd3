# shellcheck shell=bash
# The .slurm files source this, after setting $code to the folder above this one. `launch [--one-task] ARGUMENTS`
# runs `python ARGUMENTS` as one process for each task of the Slurm job, or as one process where there is no job.
# It ends the script with the exit code of the first task that failed. cluster/errors.py names them: 1 is an error
# that the user can mend, 2 a wrong flag, 75 means saved but not requeued, 143 stopped by TERM; others are a crash.

code=$(cd "$code" && pwd)

say() { echo "launch: $*" >&2; }

die() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

choose_python() {
  python=${LINEWORK_PYTHON:-$code/.venv/bin/python}
  [ -n "${LINEWORK_PYTHON:-}" ] || [ -x "$python" ] || python=python3
  command -v "$python" >/dev/null || die "LINEWORK_PYTHON=$python is not an executable"
  export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} # goes before an editable install of another copy of the code
  # A signal that comes before Python has its handler would kill the rank. While it is blocked it waits instead.
  local signal=${LINEWORK_REQUEUE_SIGNAL:-USR2}
  if env --block-signal="$signal" true 2>/dev/null; then
    rank=(env --block-signal="$signal" "$python" "$@")
  else # with coreutils before 8.31 an early signal is lost, and a periodic checkpoint makes up for it
    rank=(bash -c 'trap "" "$1"; shift; exec "$@"' rank "$signal" "$python" "$@")
  fi
}

# Prints time and path of the last written checkpoint in the --exp-dir among the arguments. A launch that got
# anywhere has changed it, even if an older checkpoint with a higher number is damaged and was passed over.
newest_checkpoint() {
  local folder='' previous='' word
  for word in "$@"; do
    case $word in --exp[-_]dir=*) folder=${word#*=} ;; esac
    case $previous in --exp[-_]dir) folder=$word ;; esac
    previous=$word
  done
  [ -z "$folder" ] || find "$folder/checkpoints" -name 'step_*.pt' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1
}

# Passes standard error on and ends with the exit code of the first task that srun calls failed, or 255 when that
# died of a signal. The code of srun itself is the highest of all tasks, which --kill-on-bad-exit makes 143.
first_failure() {
  local line cause=0
  local failed='^srun: error: .*: tasks? [^:]*: (Exited with exit code ([0-9]+))?'
  while IFS= read -r line; do
    printf '%s\n' "$line" >&2
    if [ "$cause" -eq 0 ] && [[ $line =~ $failed ]]; then cause=${BASH_REMATCH[2]:-255}; fi
  done
  return "$cause"
}

# Tells whether this life of the job still runs. After the loss of a node a later life may run elsewhere.
job_runs() {
  local known
  known=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null) || return 0
  [[ $known == *" JobState=RUNNING "* && $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# Starts the ranks, and after a crash starts them again inside the allocation, for as long as each launch leaves a
# newer checkpoint than the one before. A launch that leaves none gets one more try.
run_ranks() {
  local before after last code_first code_srun fruitless=0
  exec 3>&1
  while :; do
    before=$(newest_checkpoint "$@")
    srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${shape[@]}" \
      "${rank[@]}" 2>&1 >&3 | first_failure
    code_srun=${PIPESTATUS[0]} code_first=${PIPESTATUS[1]}
    [ "$code_srun" -ne 0 ] || return 0
    case $code_first in 1 | 2 | 75 | 143) return "$code_first" ;; esac
    job_runs || return "$code_srun"
    after=$(newest_checkpoint "$@")
    fruitless=$((fruitless + 1))
    [ "$after" = "$before" ] || fruitless=0
    if [ "$fruitless" -eq 2 ]; then
      say "crashed twice without a new checkpoint (exit code $code_srun): giving up"
      return "$code_srun"
    fi
    last=${after#* }
    say "crashed (exit code $code_srun); starting again from ${last:-the beginning}"
  done
}

launch() {
  shape=()
  if [ "$1" = --one-task ]; then
    shape=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
    shift
  fi
  choose_python "$@"
  # In a shell that is a step itself (srun --pty bash) srun would wait for that step's end; salloc's shell is none.
  if [ -z "${SLURM_JOB_ID:-}" ] || [ "${SLURM_STEP_ID:-4294967290}" != 4294967290 ]; then
    exec "${rank[@]}"
  fi
  unset "${!SLURM_CPU_BIND@}" # a job that submitted this one has left them
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  run_ranks "$@"
  exit $?
}
