#!/usr/bin/env bash
# Launches, watches and stops a script in a tmux session on the GPU machine: ./remote_train.sh --help
#
# Functions named host_* run there: they are sent as text, with the variables they use quoted by printf %q, to a bash
# that reads them from its standard input. No login shell ever parses an argument, and nothing of it is executed.
# Written for macOS's bash 3.2 as well.
set -euo pipefail

usage() {
  cat <<'END'
Launches, watches and stops a script in a tmux session on the GPU machine.

  ./remote_train.sh grpo.py --track                    short for: launch grpo.py --track
  ./remote_train.sh launch [options] SCRIPT [arguments of the script]
  ./remote_train.sh attach [SESSION]                   its terminal; ctrl-b d leaves it running
  ./remote_train.sh status [SESSION]                   state, exit code, last line of metrics, GPU
  ./remote_train.sh logs [-f] [SESSION]                what it printed; -f: and goes on to print
  ./remote_train.sh stop [SESSION]                     SIGTERM: the script saves and ends
  ./remote_train.sh resume [options] [SESSION|RUN] [arguments of the script]
                                                       the script's own --resume, in a session of the same name
  ./remote_train.sh fetch [--checkpoints] [RUN]        the run folder to runs/ here, without its checkpoints
  ./remote_train.sh list                               all sessions

Every command:
  --host HOST       user@host or a name from ~/.ssh/config; else REMOTE_HOST of .env
  --dir DIR         the project's folder there, absolute or from its home; else REMOTE_DIR of .env, or this folder's name
  --session NAME    for launch the script's name if not given, else the session launched last

launch and resume (which changes the code there only if told to):
  --branch B        the code is the pushed branch B; without it, the branch you are on, if all of it is pushed
  --sync            the code is this working tree, as it is, without what git ignores (rsync)
  --copy-env        copies .env, readable by you alone; without it none leaves this machine
  --hf-home DIR     HF_HOME there; else HF_HOME of .env
  --num-gpus N      N processes under accelerate launch; they get the first N GPUs that nobody uses
  --force           takes a GPU that another process uses
  --cpu             for a machine without a GPU
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

setting() { # setting NAME: its value in .env, which is read and not executed; nothing if it is not there
  local value
  [ -f .env ] || return 0
  value="$(sed -n "s/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$1[[:space:]]*=[[:space:]]*//p" .env | tail -n 1)"
  case $value in
    \"*\"*) value=${value#\"} value=${value%%\"*} ;;
    \'*\'*) value=${value#\'} value=${value%%\'*} ;;
    *) value="$(printf '%s' "$value" | sed 's/[[:space:]]\{1,\}#.*//; s/[[:space:]]*$//; s/^#.*//')" ;;
  esac
  printf '%s' "$value"
}

# ----------------------------------------------------------------------------------------------------------------------
# On the machine. A session's name is the user's, whatever the folder: what is known of it lies in ~/.remote_train/NAME.

host_enter() { # makes dir absolute: it is, or it lies in the home
  PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"
  sessions="$HOME/.remote_train"
  mkdir -p "$sessions"
  chmod 700 "$sessions" # arguments and logs are nobody else's business
  case $dir in
    /*) ;;
    \~/*) dir="$HOME/${dir#\~/}" ;;
    *) dir="$HOME/$dir" ;;
  esac
}

host_cd() { cd "$dir" 2>/dev/null || fail "there is no folder '$dir' on $host: launch something first, or give --dir"; }

host_lock() { # one at a time, until fd 9 is closed or this shell has ended
  exec 9>"$sessions/lock"
  flock -w 300 9 || fail "another launch on $host holds $sessions/lock: wait for it"
}

host_running() { tmux has-session -t "=$session" 2>/dev/null; }

host_smi() { timeout 30 nvidia-smi "$@"; } # a sick driver does not answer at all

host_choose_session() { # and what is known of it; if none is named, the newest that runs, for resume that does not
  local name wanted=0
  host_enter
  if [ -z "$session" ]; then
    [ "$action" != resume ] || wanted=1
    while IFS= read -r name; do
      session="${name%/job.sh}"
      if host_running; then [ "$wanted" -ne 0 ] || break; else [ "$wanted" -ne 1 ] || break; fi
      session=""
    done < <(host_by_time)
    [ -n "$session" ] || session="$(host_by_time | head -n 1)"
    session="${session%/job.sh}"
    [ -n "$session" ] || fail "no session has been launched on $host"
  fi
  folder="$sessions/$session"
  [ -f "$folder/job.sh" ] || fail "there is no session '$session' on $host: ./remote_train.sh list shows all"
  # shellcheck disable=SC1091
  . "$folder/settings" # dir, script and arguments; cpu, num_gpus, hf_home and commit where none is given now
}

# shellcheck disable=SC2012 # their names are plain
host_by_time() { (cd "$sessions" && ls -t -- */job.sh 2>/dev/null) || true; }

host_last_run() { # as host_run_folder, but before it a launch or more of that name may have failed
  local log
  # shellcheck disable=SC2012
  (cd "$folder" && ls -t -- log log.* 2>/dev/null) | while IFS= read -r log; do
    host_named <"$folder/$log"
  done | head -n 1 || true
}

host_named() { # the last run folder that a log names, in a script's first line or in a line of its own
  sed -n 's/^run folder: //p; s/^preset .*, in //p' | tail -n 1
}

host_run_folder() { tail -n "+${since:-1}" "$folder/log" | host_named; } # from line `since` on

host_state() {
  if host_running; then
    printf 'running'
  elif [ -f "$folder/exit_code" ]; then
    printf 'ended with exit code %s%s' "$(cat "$folder/exit_code")" "$([ ! -f "$folder/stopped" ] || printf ', stopped')"
  else
    printf 'ended without an exit code (killed, or the machine was restarted)'
  fi
}

host_gpus() { # sets gpus to the first num_gpus ones that no process and no session uses; with --force others after these
  local index uuid memory users other listed free="" busy="" count=0
  gpus=""
  [ -z "$cpu" ] || return 0
  command -v nvidia-smi >/dev/null || fail "no nvidia-smi on $host: for a machine without a GPU, add --cpu"
  listed="$(host_smi --query-gpu=index,uuid,memory.used --format=csv,noheader,nounits)" ||
    fail "nvidia-smi fails on $host ($listed): mend the driver, or add --cpu"
  users="$(host_smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv,noheader)"
  while IFS=', ' read -r index uuid memory; do
    count=$((count + 1)) busy="$busy,$index"
    case $users in *"$uuid"*) continue ;; esac
    case $memory in # in MiB; in a container the processes of others cannot be seen, but their memory can
      *[!0-9]*) ;;
      *) [ "$memory" -lt 2000 ] || continue ;;
    esac
    for other in "$sessions"/*/gpus; do # one that was launched a moment ago may not be there yet
      if [ -f "$other" ] && tmux has-session -t "=$(basename "$(dirname "$other")")" 2>/dev/null; then
        case ",$(cat "$other")," in *",$index,"*) continue 2 ;; esac
      fi
    done
    free="$free,$index" busy="${busy%,"$index"}"
  done <<<"$listed"
  [ "${num_gpus:-1}" -le "$count" ] || fail "$host has $count GPU(s), not $num_gpus: lower --num-gpus"
  [ "$force" -eq 0 ] || free="$free$busy"
  gpus="$(printf '%s' "${free#,}" | cut -d , -f "1-${num_gpus:-1}")"
  [ "$(printf '%s\n' "$gpus" | tr ',' '\n' | grep -c .)" -eq "${num_gpus:-1}" ] ||
    fail "$host has not ${num_gpus:-1} GPU(s) that nobody uses: wait, or take them all the same with --force; in use by
${users:-a process or session that cannot be seen from here}"
}

host_check() { # what can be known before any code is sent; prints the folder's absolute path
  local tool folder script arguments=()
  host_enter
  for tool in tmux "$code_tool"; do
    command -v "$tool" >/dev/null || fail "no $tool on $host: install it there (apt-get install $tool)"
  done
  if [ "$action" = launch ]; then
    if host_running; then
      fail "session '$session' runs on $host already: attach to it, stop it, or give another --session"
    fi
    host_gpus
  elif [ -z "$session" ] || [ -f "$sessions/$session/settings" ]; then # of a session, not of a run folder
    host_choose_session
    if host_running; then fail "session '$session' still runs on $host: nothing to resume"; fi
  fi
  if ! command -v uv >/dev/null; then
    printf 'installing uv in the home folder of %s\n' "$host" >&2
    { curl -LsSf https://astral.sh/uv/install.sh | sh || python3 -m pip install --user -I uv ||
      python3 -m pip install --user -I --break-system-packages uv; } >&2 || true
    hash -r
    command -v uv >/dev/null || fail "cannot install uv on $host: https://docs.astral.sh/uv says how"
  fi
  [ "$code_tool" != rsync ] || mkdir -p "$dir/runs"
  printf 'folder: %s\n' "$dir"
}

host_pull() { # the pushed branch, into a folder that may not be there yet; prints its commit
  local changed name
  export GIT_TERMINAL_PROMPT=0
  if [ -z "$(ls -A "$dir" 2>/dev/null)" ]; then
    git clone --quiet --branch "$branch" -- "$url" "$dir" ||
      fail "$host cannot clone branch '$branch' of $url: push it, give $host access to it, or send the code with --sync"
  fi
  cd "$dir"
  [ -e .git ] || fail "'$dir' on $host is no git clone: --sync, or another --dir"
  git fetch --quiet origin "+refs/heads/$branch:refs/remotes/origin/$branch" ||
    fail "$host cannot fetch branch '$branch': push it, give $host access to it, or send the code with --sync"
  # What --sync brought and is pushed by now is no change of its own.
  git diff --name-only -z HEAD >.git/changed
  git ls-files --others --exclude-standard -z >.git/new
  while IFS= read -r -d '' name; do
    if git show "origin/$branch:$name" 2>/dev/null | cmp -s - "$name"; then git checkout --quiet HEAD -- "$name"; fi
  done <.git/changed
  while IFS= read -r -d '' name; do
    if git show "origin/$branch:$name" 2>/dev/null | cmp -s - "$name"; then rm -f -- "$name"; fi
  done <.git/new
  changed="$(git status --porcelain --untracked-files=no)"
  [ -z "$changed" ] || fail "'$dir' on $host has changes of its own: --sync, another --dir, or undo them there
$changed"
  { git checkout --quiet "$branch" -- && git merge --quiet --ff-only "origin/$branch"; } ||
    fail "'$dir' on $host cannot go to the pushed '$branch', see above (was it rewritten?): another --dir, or mend it there"
  printf 'commit: %s\n' "$(git rev-parse HEAD)"
}

host_forget() { # files that an earlier --sync sent and that are gone here; none beyond a link to elsewhere
  local name
  host_enter
  host_lock
  cd "$dir"
  while IFS= read -r -d '' name; do
    [ ! -d "$name" ] || [ -L "$name" ] || continue
    case "$(realpath -m -- "$(dirname -- "$name")")/" in "$(pwd -P)/"*) rm -f -- "$name" ;; esac
  done <"runs/.gone.$token"
  mv "runs/.sent.$token" runs/.sent
  rm -f "runs/.gone.$token"
}

host_torch() { # exits if torch does not see the GPU, with the reason
  local found driver
  found="$(CUDA_VISIBLE_DEVICES="$gpus" "$python" -W ignore -c '
import torch
print(torch.__version__, torch.version.cuda, torch.cuda.is_available())')"
  driver="$(host_smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
  case $found in
    *True) return 0 ;;
    *None*) fail "torch ${found%% *} is built without CUDA: take another build in pyproject.toml, or add --cpu" ;;
  esac
  found="${found% *}"
  fail "torch ${found% *} is built for CUDA ${found##* } and does not see the GPU of $host, whose driver $driver knows $(
    host_smi | sed -n 's/.*\(CUDA [A-Za-z ]*Version: [0-9.]*\).*/\1/p'
  ): install a newer driver (CUDA 13 needs 580, CUDA 12 needs 525), or a torch built for that CUDA in pyproject.toml"
}

host_start() { # starts command, the script and its arguments, in the session; waits until it trains or has ended
  local folder python launcher=() name since=1 run=""
  host_enter
  host_cd
  [ -f "${command[0]}" ] || fail "there is no '${command[0]}' in $dir on $host: push it, or --sync"
  host_gpus
  uv sync --locked || fail "uv sync --locked fails on $host, see above"
  python="$(uv run --no-sync python -c 'import sys; print(sys.executable)')"
  [ -n "$cpu" ] || host_torch
  if [ -n "$hf_home" ]; then
    hf_home="${hf_home/#\~\//$HOME/}"
    mkdir -p "$hf_home" || fail "cannot make HF_HOME '$hf_home' on $host: give --hf-home, or mend HF_HOME in .env"
  fi
  if [ "${num_gpus:-1}" -gt 1 ]; then # every value is given: a default_config.yaml of accelerate's has no say
    launcher=(-m accelerate.commands.launch --multi_gpu --num_processes "$num_gpus" --gpu_ids all --num_machines 1
      --mixed_precision no --dynamo_backend no --main_process_port 0)
  fi
  host_lock # what was free before all this took its time may not be so any more
  if host_running; then fail "session '$session' runs on $host already: stop it, or give another --session"; fi
  host_gpus
  folder="$sessions/$session"
  mkdir -p "$folder"
  [ "$resumed" -eq 1 ] || [ ! -f "$folder/log" ] || mv "$folder/log" "$folder/log.$(date -r "$folder/log" +%Y%m%d-%H%M%S)"
  touch "$folder/log"
  since=$(($(wc -l <"$folder/log") + 1))
  rm -f "$folder/exit_code" "$folder/pid" "$folder/stopped"
  printf '%s\n' "$gpus" >"$folder/gpus"
  { # for resume: what was given then, unless something else is given now
    printf 'dir=%q script=%q arguments=(%s)\n' "$PWD" "${command[0]}" "$(printf '%q ' "${command[@]:1}")"
    for name in cpu num_gpus hf_home commit; do
      printf '[ -n "$%s" ] || %s=%q\n' "$name" "$name" "${!name}"
    done
  } >"$folder/settings"
  { # what the session runs
    printf 'cd %q || exit 1\n' "$PWD"
    printf 'export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=%q PYTHONUNBUFFERED=1\n' "$gpus"
    [ -z "$hf_home" ] || printf 'export HF_HOME=%q\n' "$hf_home"
    [ -z "$commit" ] || printf 'export WANDB_GIT_COMMIT=%q\n' "$commit"
    # What is printed goes to the terminal and to the log. A signal is for the script, which saves: log and exit code
    # wait for it, and the exit code for the log, but not for a process that the script left behind. Where the terminal
    # goes (tmux kill-session), this shell ends: only then does the kernel tell the script too.
    printf 'exec > >(trap "" INT TERM HUP; exec tee -a %q) 2>&1\n' "$folder/log"
    # shellcheck disable=SC2016 # for the shell that runs it
    printf 'log=$!\ntrap : INT TERM\n(echo "$BASHPID" >%q; exec %s)\ncode=$?\nrm %q\nexec >&- 2>&-\n' \
      "$folder/pid" "$(printf '%q ' "$python" ${launcher[@]+"${launcher[@]}"} "${command[@]}")" "$folder/pid"
    # shellcheck disable=SC2016
    printf 'for _ in {1..30}; do kill -0 "$log" && sleep 0.1 || break; done\necho "$code" >%q\n' "$folder/exit_code"
  } >"$folder/job.sh"
  # Whatever the user's tmux.conf says: the session ends when the script does, and not when nobody looks at it.
  tmux new-session -d -s "$session" -x 200 -y 50 "exec bash $(printf '%q' "$folder/job.sh")" \; \
    set-option destroy-unattached off \; set-option -w remain-on-exit off 9>&-
  exec 9>&-
  for _ in $(seq 120); do
    run="$(host_run_folder)"
    if [ -n "$run" ] || ! host_running; then break; fi
    sleep 0.5
  done
  tail -n "+$since" "$folder/log"
  if ! host_running && [ "$(cat "$folder/exit_code" 2>/dev/null)" != 0 ]; then
    printf "error: session '%s' on %s %s\n" "$session" "$host" "$(host_state)" >&2
    exit "$(cat "$folder/exit_code" 2>/dev/null || echo 1)"
  fi
  printf "\nsession '%s' on %s: %s%s\n" "$session" "$host" "$(host_state)" "${gpus:+, GPU $gpus}"
  host_running || return 0
  printf "  ./remote_train.sh%s %-${#session}s %s\n" \
    "$flags" "attach $session" "  its terminal; ctrl-b d leaves it running" "$flags" "logs -f $session" " and status" \
    "$flags" "stop $session" "    it saves; resume $session continues"
}

host_resume() { # the script of a session with --resume and the run folder that its log names, or that of a run folder
  local folder="" run="" script="" given="$commit" base name arguments=()
  host_enter
  resumed=1
  base="$(basename "$session")"
  if [ "$base" != "${base%%__*}" ] && [ ! -f "$sessions/$session/settings" ]; then
    host_cd
    run="$session"
    [ -d "$run" ] || run="runs/$run"
    [ -f "$run/config.json" ] || fail "there is no session and no run folder '$session' on $host (the latter in $dir)"
    session="${base%%__*}"
    script="$session.py"
    name="$(grep -lE "^(run folder: |preset .*, in )(.*/)?$base\$" "$sessions"/*/log 2>/dev/null | head -n 1)" || true
    [ -z "$name" ] || session="$(basename "$(dirname "$name")")" # its settings are known
    [ -n "$name" ] || resumed=0                                  # a log of its own
  fi
  if [ "$resumed" -eq 1 ]; then
    host_choose_session
    [ "$code_tool" = bash ] || commit="$given" # other code than then
    host_cd
    [ -n "$run" ] || run="$(host_last_run)"
    [ -n "$run" ] || fail "session '$session' made no run folder: launch it again"
  fi
  if host_running; then fail "session '$session' still runs on $host: nothing to resume"; fi
  [ -f "$script" ] || fail "$script is not in $dir any more: --sync or --branch brings it; a copy is in $run"
  uv sync --locked --quiet || fail "uv sync --locked fails on $host, see above"
  [[ "$(uv run --no-sync python "$script" --help 2>&1)" == *--resume* ]] ||
    fail "$script has no --resume, launch it again: ./remote_train.sh$flags --session $session $script $(
      printf '%q ' ${arguments[@]+"${arguments[@]}"}
    )"
  command=("$script" --resume "$run" ${command[@]+"${command[@]}"})
  host_start
}

host_attachable() { # prints the session's name
  local folder
  host_choose_session
  host_running || fail "session '$session' on $host $(host_state): ./remote_train.sh logs $session"
  printf 'session: %s\n' "$session"
}

host_status() {
  local folder run script arguments=() since
  host_choose_session
  host_cd
  printf '%s: %s\n' "$session" "$(host_state)"
  run="$(host_run_folder)"
  printf '%s\n' "${run:-no run folder yet}"
  if [ -s "$run/metrics.jsonl" ]; then
    tail -n 1 "$run/metrics.jsonl"
    printf '%s (%s s ago)\n' "$(grep -aE '^ *[0-9]+% [0-9]+/[0-9]+ ' "$folder/log" | tail -n 1)" \
      $(($(date +%s) - $(date -r "$run/metrics.jsonl" +%s)))
  else
    printf 'no metrics yet\n'
  fi
  if [ -n "$(cat "$folder/gpus")" ]; then
    host_smi -i "$(cat "$folder/gpus")" --format=csv,noheader \
      --query-gpu=index,name,utilization.gpu,memory.used,memory.total || true
  else
    printf 'on the CPU\n'
  fi
  if ! host_running && [ "$(cat "$folder/exit_code" 2>/dev/null)" != 0 ]; then
    printf '...\n'
    tail -n 8 "$folder/log"
  fi
}

host_logs() {
  local folder
  host_choose_session
  if [ "$follow" -eq 1 ] && host_running && [ -f "$folder/pid" ]; then
    tail -n 100 -f --pid="$(cat "$folder/pid")" "$folder/log"
    for _ in $(seq 40); do if host_running; then sleep 0.1; fi; done
    printf '%s: %s\n' "$session" "$(host_state)"
  else
    cat "$folder/log"
  fi
}

host_stop() {
  local folder since
  host_choose_session
  host_running || fail "session '$session' on $host $(host_state)"
  since=$(($(wc -l <"$folder/log") + 1))
  touch "$folder/stopped"
  [ ! -f "$folder/pid" ] || kill -TERM "$(cat "$folder/pid")"
  printf '%s: SIGTERM sent, waiting\n' "$session"
  for _ in $(seq 240); do
    if ! host_running; then
      tail -n "+$since" "$folder/log" | grep 'to continue: ' | tail -n 1 || tail -n 3 "$folder/log"
      printf '%s: %s; from here, ./remote_train.sh%s resume %s\n' "$session" "$(host_state)" "$flags" "$session"
      return 0
    fi
    sleep 0.5
  done
  fail "session '$session' still runs after two minutes: look at it with attach; process $(cat "$folder/pid") on $host"
}

host_find_run() { # prints the absolute path of the run folder, or sweep, to fetch
  local folder found="" script arguments=() typed="$run"
  host_enter
  [ "$run" = / ] || run="${run%/}"
  if [ -z "$run" ] || [ -f "$sessions/$run/settings" ]; then
    session="$run"
    host_choose_session
    run="$(host_last_run)"
    [ -n "$run" ] || fail "session '$session' made no run folder"
  fi
  host_cd
  [ -d "$run" ] || run="runs/$run"
  for found in "$run"/config.json "$run"/*/config.json "$run"/*/result.json; do [ ! -f "$found" ] || break; done
  case /$run/ in */../* | */./*) found="" ;; esac
  { [ -f "$found" ] && [ ! "$run" -ef . ] && [ ! "$run" -ef runs ]; } ||
    fail "there is no run folder '$typed' in $dir on $host"
  printf 'folder: %s\n' "$(cd "$run" && pwd)"
}

host_list() { # the one launched last first
  local folder script arguments=() since name
  host_enter
  host_by_time | while IFS= read -r name; do
    session="${name%/job.sh}"
    folder="$sessions/$session"
    # shellcheck disable=SC1091
    . "$folder/settings"
    printf '%s: %s; %s, %s, in %s %s\n' "$session" "$(host_state)" "$(date -r "$folder/job.sh" '+%Y-%m-%d %H:%M')" \
      "$script" "$dir" "$(host_run_folder)"
  done
}

# ----------------------------------------------------------------------------------------------------------------------
# Here

check_words() {
  [ -n "$host" ] || fail "no machine: put REMOTE_HOST=user@host into .env, or give --host"
  case $host in -* | *[!A-Za-z0-9._@:%-]*) fail "'$host' is no host: --host takes user@host or a name from ssh's config" ;; esac
  case $dir in "" | -* | *[!A-Za-z0-9._/~-]*) fail "'$dir' is no folder's name: --dir takes letters, digits and ._/-" ;; esac
  case $session in *[!A-Za-z0-9_-]*)
    # resume also takes a run folder
    [ "$action" = resume ] || fail "'$session' is no session's name: it has letters, digits, _ and -"
    ;;
  esac
  case $num_gpus in *[!0-9]* | 0*) fail "'$num_gpus' is no number of processes: --num-gpus takes 1, 2, ..." ;; esac
}

connect() {
  check_words
  ssh=(ssh -o ConnectTimeout=10 -o ServerAliveInterval=15)
  scratch="$(mktemp -d /tmp/remote_train.XXXXXX)" # a socket's path must be short
  trap '"${ssh[@]}" -o ControlPath="$scratch/ssh" -O exit "$host" 2>/dev/null || true; rm -rf "$scratch"' EXIT
  # One connection for all that follows, so one passphrase, unless the user shares connections already.
  if ! ssh -G "$host" 2>/dev/null | grep -i '^controlpath ' | grep -qvi ' none$'; then
    ssh+=(-o ControlMaster=auto -o "ControlPath=$scratch/ssh" -o ControlPersist=60)
  fi
  "${ssh[@]}" "$host" true </dev/null >/dev/null ||
    fail "no connection to '$host': try ssh $host; the machine is --host, or REMOTE_HOST in .env"
}

on_host() { # on_host FUNCTION: runs a host_ function there
  local name
  {
    printf 'set -euo pipefail\n'
    # shellcheck disable=SC2046 # names of functions
    declare -f fail $(compgen -A function host_)
    for name in action flags host dir session run branch url commit code_tool token hf_home num_gpus cpu force follow; do
      printf '%s=%q\n' "$name" "${!name}"
    done
    printf 'gpus="" resumed=0 command=(%s)\n' "$([ ${#command[@]} -eq 0 ] || printf '%q ' "${command[@]}")"
    printf '{ %s </dev/null; exit; }\n' "$1"
  } | "${ssh[@]}" "$host" 'exec bash -s'
}

ask_host() { # ask_host FUNCTION KEY: the value of its line "KEY: value"; what the login shell there may print is ignored
  local printed
  printed="$(on_host "$1")" || return # set -e does not hold in $( )
  printf '%s\n' "$printed" | sed -n "s/^$2: //p" | tail -n 1
}

ask_folder() { # ask_folder FUNCTION: sets dir to the absolute one that it answers, which rsync and ssh can take
  dir="$(ask_host "$1" folder)" || exit
  case $dir in /*[!A-Za-z0-9._/-]* | */.. | */. | "" | [!/]*) fail "'$dir' on $host: it needs letters, digits and ._/- only" ;; esac
}

sync_code() { # the working tree without what git ignores; what an earlier one sent and is gone here goes there too
  local name sent="$scratch/.sent.$token" gone="$scratch/.gone.$token"
  git ls-files -coz --exclude-standard | while IFS= read -r -d '' name; do
    case $name in .env | runs | .venv | wandb) continue ;; esac # a link to elsewhere is not ignored as runs/ is
    if [ -f "$name" ] || [ -L "$name" ]; then printf './%s\0' "$name"; fi
  done >"$sent"
  : >"$gone"
  if rsync -z -e "${ssh[*]}" "$host:$dir/runs/.sent" "$scratch/before" 2>/dev/null; then
    while IFS= read -r -d '' name; do
      if [ ! -e "$name" ] && [ ! -L "$name" ]; then printf '%s\0' "$name"; fi
    done <"$scratch/before" >"$gone"
  fi
  rsync -z -e "${ssh[*]}" "$sent" "$gone" "$host:$dir/runs/"
  on_host host_forget
  # Not -a: files that belong to a user of this machine there would be refused by git.
  rsync -lptz -e "${ssh[*]}" --from0 --files-from="$sent" ./ "$host:$dir/"
}

bring_code() { # the code, if it is to change, and .env, if it was asked for
  local pulled own
  if [ "$code_tool" = rsync ]; then
    sync_code
    printf 'code: this working tree, %s\n' "${commit:-not a commit}"
  elif [ "$code_tool" = git ]; then
    pulled="$(ask_host host_pull commit)"
    own="$(git rev-parse HEAD)"
    [ "$pulled" = "$own" ] || [ "$branch_given" -eq 1 ] ||
      fail "the pushed '$branch' is at ${pulled:0:9}, yours at ${own:0:9}: git push, --sync, or --branch $branch"
    printf "code: branch '%s' at %s\n" "$branch" "${pulled:0:9}"
  fi
  if [ "$copy_env" -eq 1 ]; then
    [ -f .env ] || fail "there is no .env to copy: copy .env.example to it and fill it in"
    "${ssh[@]}" "$host" "umask 077 && cat > '$dir/.env.new' && mv '$dir/.env.new' '$dir/.env'" <.env
  fi
}

check_code() { # what can be known here; sets url, branch and commit
  local changed
  if [ "$code_tool" = rsync ]; then
    git rev-parse --quiet --git-dir >/dev/null || fail "--sync needs git, to know which files it ignores"
    commit="$(git rev-parse --quiet --verify HEAD)" || true
    [ -z "$(git status --porcelain)" ] || commit="$commit-dirty" # files that git does not know yet count
  elif [ "$code_tool" = git ]; then
    url="$(git remote get-url origin 2>/dev/null)" || fail "there is no git remote 'origin' to pull from: --sync"
    # What it says of who you are stays here: the machine has its own access, or none.
    url="$(printf '%s' "$url" | sed 's|^\([Hh][Tt][Tt][Pp][Ss]*://\)[^/]*@|\1|; s|^\([A-Za-z+]*://[^/:@]*\):[^/]*@|\1@|; s|[?#].*||')"
    [ -n "$branch" ] || branch="$(git symbolic-ref --quiet --short HEAD)" || fail "on no branch: --branch B, or --sync"
    [ "$branch_given" -eq 0 ] || return 0
    changed="$(git status --porcelain --untracked-files=no && git ls-files --others --exclude-standard -- "$@")"
    [ -z "$changed" ] || fail "this would not get there: commit and push it, or send the tree as it is with --sync
$changed"
    changed="$(git ls-files --others --exclude-standard -- '*.py')"
    [ -z "$changed" ] || printf 'note: not under git, so not sent: %s\n' "$changed" >&2
  fi
}

launch() {
  local script="${command[0]:-}" word
  [ -n "$script" ] || fail "which script? ./remote_train.sh launch SCRIPT; see --help"
  [ -f "$script" ] || [ "$branch_given" -eq 1 ] || fail "there is no '$script' here"
  [ -n "$session" ] || session="$(basename "$script" .py | tr -c 'A-Za-z0-9_\n-' _)"
  for word in "${command[@]:1}"; do
    case $word in --cpu | --sync | --session | --host | --dir | --branch | --copy-env | --force | --num-gpus | --hf-home)
      printf 'note: %s stands after the script, so the script gets it; our options stand before\n' "$word" >&2
      ;;
    esac
  done
  check_words
  check_code "$script"
  connect
  ask_folder host_check
  bring_code
  on_host host_start
}

resume() {
  check_code
  connect
  ask_folder host_check
  bring_code
  on_host host_resume
}

attach() {
  [ -t 0 ] || fail "attach wants a terminal; ./remote_train.sh logs -f does not"
  connect
  session="$(ask_host host_attachable session)"
  # The terminal may be one that the machine has not heard of.
  "${ssh[@]}" -t "$host" "sh -c 'PATH=\"\$HOME/.local/bin:\$PATH\"; infocmp >/dev/null 2>&1 || export TERM=xterm-256color; exec tmux -u attach -t \"=$session\"'"
}

fetch() {
  local without=() name
  connect
  ask_folder host_find_run
  name="runs/${dir##*/}"
  case $dir in */runs/*) name="runs/${dir##*/runs/}" ;; esac
  mkdir -p "$name"
  [ "$checkpoints" -eq 1 ] || without=(--exclude=checkpoints/)
  # -u: a run that was continued here is not overwritten. 24: a file that the run has replaced meanwhile
  rsync -rltuz -e "${ssh[*]}" --exclude=/lock ${without[@]+"${without[@]}"} "$host:$dir/" "$name/" || [ $? -eq 24 ]
  printf '%s\n' "$name"
}

main() {
  trap 'printf "\ninterrupted; what was started there goes on: ./remote_train.sh list\n" >&2; exit 130' INT
  cd "$(dirname "${BASH_SOURCE[0]}")"
  [ $# -gt 0 ] || { usage >&2 && exit 2; }
  host="$(setting REMOTE_HOST)" dir="$(setting REMOTE_DIR)" hf_home="$(setting HF_HOME)" flags=""
  action="" session="" run="" branch="" url="" commit="" token="$$.$RANDOM" num_gpus="" cpu="" command=()
  code_tool="" branch_given=0 copy_env=0 force=0 follow=0 checkpoints=0
  [ -n "$dir" ] || dir="$(basename "$PWD")"
  while [ $# -gt 0 ]; do
    case $1 in
      --host=* | --dir=* | --session=* | --branch=* | --hf-home=* | --num-gpus=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
      --host | --dir | --session | --branch | --hf-home | --num-gpus) [ -n "${2:-}" ] || fail "$1 needs a value" ;;
    esac
    case $1 in
      -h | --help | help) usage && exit 0 ;;
      --host) host="$2" flags="$flags --host $2" && shift ;;
      --dir) dir="$2" flags="$flags --dir $2" && shift ;;
      --session) session="$2" && shift ;;
      --branch) branch="$2" branch_given=1 && shift ;;
      --sync) code_tool=rsync ;;
      --copy-env) copy_env=1 ;;
      --hf-home) hf_home="$2" && shift ;;
      --num-gpus) num_gpus="$2" && shift ;;
      --force) force=1 ;;
      --cpu) cpu=1 ;;
      -f) follow=1 ;;
      --checkpoints) checkpoints=1 ;;
      -*)
        [ "$action" != resume ] || break # it is the script's
        fail "unknown option '$1': see --help"
        ;;
      *)
        case "$action:$1" in
          :launch | :attach | :status | :logs | :stop | :resume | :fetch | :list) action="$1" ;;
          :*.py | launch:*) action=launch && break ;;
          :*) fail "'$1' is neither a command nor a script: see --help" ;;
          resume:*) session="${1%/}" && shift && break ;;
          *)
            [ -z "$session$run" ] || fail "'$1' is one word too many for $action: see --help"
            if [ "$action" = fetch ]; then run="$1"; else session="${1%.py}"; fi
            ;;
        esac
        ;;
    esac
    shift
  done
  [ -n "$action" ] || fail "which script? see --help"
  [ "$branch_given" -eq 0 ] || [ -z "$code_tool" ] || fail "--branch or --sync, not both"
  if [ -z "$code_tool" ]; then
    code_tool=git
    if [ "$action" = resume ] && [ "$branch_given" -eq 0 ]; then code_tool=bash; fi # the code that is there stays
  fi
  case $action in
    launch | resume)
      command=("$@")
      "$action"
      ;;
    attach | fetch) "$action" ;;
    *)
      connect
      on_host "host_$action"
      ;;
  esac
}

main "$@"
