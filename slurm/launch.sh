# shellcheck shell=bash
# The .slurm files source this, after setting $code to the folder above this one. `launch EXP_DIR SCRIPT ARGUMENTS`
# runs `python ARGUMENTS` as one process for each task of the Slurm job, or as one process where there is no job.
# EXP_DIR is the folder of the run unless the arguments name another; --one-task in its place stands for a stage
# that is one process always and that keeps no checkpoints. SCRIPT is what messages call the program.
# It ends the script with the exit code of the first task that failed. cluster/errors.py names them: 1 is an error
# that the user can mend, 2 a wrong flag, 75 means saved but not requeued, 143 stopped by TERM; others are a crash.

code=$(cd "$code" && pwd)

MOST_EXCLUDED=3 # nodes that a job may leave because of their GPUs

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
  case ${python##*/} in
    python*)
      "$python" -c 'import importlib.util as u, sys; sys.exit(3 if u.find_spec("torch") is None else 0)' 2>/dev/null
      [ $? -ne 3 ] || die "$(command -v "$python") has no torch: name a Python that has it in LINEWORK_PYTHON"
      ;;
  esac
  # A signal that comes before Python has its handler would kill the rank. While it is blocked it waits instead.
  local signal=${LINEWORK_REQUEUE_SIGNAL:-USR2}
  if env --block-signal="$signal" true 2>/dev/null; then
    rank=(env --block-signal="$signal" "$python" "$@")
  else # with coreutils before 8.31 an early signal is lost, and a periodic checkpoint makes up for it
    rank=(bash -c 'trap "" "$1"; shift; exec "$@"' rank "$signal" "$python" "$@")
  fi
}

# Sets $folder to the --exp-dir among the arguments, if there is one.
find_exp_dir() {
  local previous='' word
  for word in "$@"; do
    case $word in --exp[-_]dir=*) folder=${word#*=} ;; esac
    case $previous in --exp[-_]dir) folder=$word ;; esac
    previous=$word
  done
}

# Prints time and path of the last written checkpoint in $folder. A launch that got anywhere has changed it, even
# if an older checkpoint with a higher number is damaged and was passed over.
newest_checkpoint() {
  [ -z "$folder" ] || find "$folder/checkpoints" -name 'step_*.pt' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1
}

# The first launch of a job makes the folder of checkpoints; where a later one finds none, that of the run was
# removed, or its disk is not there. To begin anew from step 0 is not what was asked for then.
keep_folder() {
  if [ -z "$folder" ] || [ -d "$folder/checkpoints" ]; then
    return
  fi
  [ "$1" = first ] || die "$folder/checkpoints is gone from ${SLURMD_NODENAME:-here} since this job began; bring it \
back, or submit again to begin anew"
  mkdir -p "$folder/checkpoints" 2>/dev/null # where that fails the stage says why
}

# Passes standard error on, adds to $faulty the nodes with a broken GPU that it names, and ends with the exit code of the first task that srun calls failed, or 255 when that
# died of a signal. The code of srun itself is the highest of all tasks, which --kill-on-bad-exit makes 143.
first_failure() {
  local line cause=0
  local failed='^srun: error: .*: tasks? [^:]*: (Exited with exit code ([0-9]+))?'
  local fault='^error: GPU fault on ([^ :]+):'
  while IFS= read -r line; do
    printf '%s\n' "$line" >&2
    if [ "$cause" -eq 0 ] && [[ $line =~ $failed ]]; then cause=${BASH_REMATCH[2]:-255}; fi
    if [[ $line =~ $fault && ,$faulty, != *",${BASH_REMATCH[1]},"* ]]; then faulty+=${faulty:+,}${BASH_REMATCH[1]}; fi
  done
  return "$cause"
}

# Tells whether this life of the job still runs. After the loss of a node a later life may run elsewhere.
job_runs() {
  local known
  known=$(scontrol -o show job "$job" 2>/dev/null) || return 0
  [[ $known == *" JobState=RUNNING "* && $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# Requeues this job without the nodes in $faulty, and waits to be ended. It returns where that can't be done: too few
# nodes are left, Slurm refuses, or $MOST_EXCLUDED are excluded already, so that the fault is hardly that of a node.
leave_faulty() {
  local excluded where=(--partition="${SLURM_JOB_PARTITION:-}" --nodes="${SLURM_JOB_NUM_NODES:-1}")
  excluded=$(scontrol -o show job "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
  [ "$excluded" != "(null)" ] || excluded=''
  if [ "$(scontrol show hostnames "$excluded" 2>/dev/null | wc -l)" -ge "$MOST_EXCLUDED" ]; then
    say "GPUs failed on $faulty, and before on $excluded: giving up"
    return
  fi
  excluded=${excluded:+$excluded,}$faulty
  if ! sbatch --test-only --exclude="$excluded" "${where[@]}" --wrap true >/dev/null 2>&1; then
    say "GPUs failed on $faulty, and without $excluded too few nodes are left: giving up"
    return
  fi
  say "GPUs failed on $faulty: this job is requeued and goes on without $excluded"
  trap '' TERM # Slurm sends it when it takes the job back, and only a job that waits can be given other nodes
  scontrol requeue "$job" || return
  scontrol update "jobid=$job" "ExcNodeList=$excluded" || say "Slurm excludes no node of it; to end it: scancel $job"
  sleep 600
}

# Starts the ranks, and after a crash starts them again inside the allocation, for as long as each launch leaves a
# newer checkpoint than the one before. A launch that leaves none gets one more try.
run_ranks() {
  local before after last code_first code_srun fruitless=0 faulty='' which=first
  [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || which=later
  shopt -s lastpipe # first_failure sets $faulty
  exec 3>&1
  while :; do
    keep_folder "$which"
    which=later before=$(newest_checkpoint)
    srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${shape[@]}" \
      "${rank[@]}" 2>&1 >&3 | first_failure
    code_srun=${PIPESTATUS[0]} code_first=${PIPESTATUS[1]}
    [ "$code_srun" -ne 0 ] || return 0
    if [ -n "$faulty" ]; then
      job_runs && leave_faulty
      return 70
    fi
    case $code_first in 1 | 2 | 75 | 143) return "$code_first" ;; esac
    job_runs || return "$code_srun"
    after=$(newest_checkpoint)
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
  local shape=() folder=$1 script=$2
  if [ "$folder" = --one-task ]; then
    shape=(--nodes=1 --ntasks=1 --ntasks-per-node=1) folder=''
  fi
  shift 2
  [ -z "$folder" ] || find_exp_dir "$@"
  export LINEWORK_COMMAND="bash $script"
  [ -z "${SLURM_JOB_ID:-}" ] || LINEWORK_COMMAND="sbatch $script"
  choose_python "$@"
  # In a shell that is a step itself (srun --pty bash) srun would wait for that step's end; salloc's shell is none.
  if [ -z "${SLURM_JOB_ID:-}" ] || [ "${SLURM_STEP_ID:-4294967290}" != 4294967290 ]; then
    exec "${rank[@]}"
  fi
  unset "${!SLURM_CPU_BIND@}" # a job that submitted this one has left them
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  job=${job:-$SLURM_JOB_ID}
  run_ranks
  exit $?
}
