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
# On the machine

host_enter() { # makes dir absolute: it is, or it lies in the home
  PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"
  case $dir in
    /*) ;;
    \~/*) dir="$HOME/${dir#\~/}" ;;
    *) dir="$HOME/$dir" ;;
  esac
}

host_cd() {
  host_enter
  cd "$dir" 2>/dev/null || fail "there is no folder '$dir' on $host: launch something first, or give --dir"
}

host_running() { tmux has-session -t "=$session" 2>/dev/null; }

host_choose_session() { # the one that was launched last, if none is named
  # shellcheck disable=SC2012 # their names are plain
  [ -n "$session" ] || session="$(cd runs/.sessions 2>/dev/null && ls -t -- */job.sh 2>/dev/null | head -n 1)"
  session="${session%/job.sh}"
  folder="runs/.sessions/$session"
  { [ -n "$session" ] && [ -f "$folder/job.sh" ]; } ||
    fail "there is no session '$session' in $dir on $host: ./remote_train.sh list shows all"
}

host_run_folder() { # the last one that the log names, from line `since` on
  tail -n "+${since:-1}" "$folder/log" | sed -n 's/^run folder: //p' | tail -n 1 |
    sed 's/, going on after step [0-9]*$//'
}

host_state() {
  if host_running; then
    printf 'running'
  elif [ -f "$folder/exit_code" ]; then
    printf 'ended with exit code %s' "$(cat "$folder/exit_code")"
  else
    printf 'ended without an exit code (killed, or the machine was restarted)'
  fi
}

host_gpus() { # sets gpus to the first num_gpus ones that no process and no session uses, with --force to the first
  local index uuid memory users other listed free="" all="" count=0
  gpus=""
  [ -z "$cpu" ] || return 0
  command -v nvidia-smi >/dev/null || fail "no nvidia-smi on $host: for a machine without a GPU, add --cpu"
  listed="$(nvidia-smi --query-gpu=index,uuid,memory.used --format=csv,noheader,nounits 2>&1)" ||
    fail "nvidia-smi fails on $host ($listed): mend the driver, or add --cpu"
  users="$(nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv,noheader)"
  while IFS=', ' read -r index uuid memory; do
    all="$all,$index" count=$((count + 1))
    case $users in *"$uuid"*) continue ;; esac
    case $memory in # in MiB; in a container the processes of others cannot be seen, but their memory can
      *[!0-9]*) ;;
      *) [ "$memory" -lt 2000 ] || continue ;;
    esac
    for other in runs/.sessions/*/gpus; do # one that was launched a moment ago may not be there yet
      if [ -f "$other" ] && tmux has-session -t "=$(basename "$(dirname "$other")")" 2>/dev/null; then
        case ",$(cat "$other")," in *",$index,"*) continue 2 ;; esac
      fi
    done
    free="$free,$index"
  done <<<"$listed"
  [ "${num_gpus:-1}" -le "$count" ] || fail "$host has $count GPU(s), not $num_gpus: lower --num-gpus"
  [ "$force" -eq 0 ] || free="$all"
  gpus="$(printf '%s' "${free#,}" | cut -d , -f "1-${num_gpus:-1}")"
  [ "$(printf '%s\n' "$gpus" | tr ',' '\n' | grep -c .)" -eq "${num_gpus:-1}" ] ||
    fail "$host has not ${num_gpus:-1} GPU(s) that nobody uses: wait, or take them all the same with --force; in use by
${users:-a process or session that cannot be seen from here}"
}

host_check() { # what can be known before any code is sent; prints the folder's absolute path
  local tool
  host_enter
  for tool in tmux "$code_tool"; do
    command -v "$tool" >/dev/null || fail "no $tool on $host: install it there (apt-get install $tool)"
  done
  if [ -n "$session" ] && host_running; then
    fail "session '$session' runs on $host already: attach to it, stop it, or give another --session"
  fi
  [ "$code_tool" != rsync ] || mkdir -p "$dir/runs/.sessions"
  cd "$dir" 2>/dev/null || cd "$HOME"
  [ "$action" != launch ] || host_gpus # a resumed run takes what it took then
  if ! command -v uv >/dev/null; then
    printf 'installing uv in the home folder of %s\n' "$host" >&2
    { curl -LsSf https://astral.sh/uv/install.sh | sh || python3 -m pip install --user -I uv ||
      python3 -m pip install --user -I --break-system-packages uv; } >&2 || true
    hash -r
    command -v uv >/dev/null || fail "cannot install uv on $host: https://docs.astral.sh/uv says how"
  fi
  printf 'folder: %s\n' "$dir"
}

host_pull() { # the pushed branch, into a folder that may not be there yet; prints its commit
  local changed
  export GIT_TERMINAL_PROMPT=0
  if [ ! -e "$dir" ]; then
    git clone --quiet --branch "$branch" -- "$url" "$dir" ||
      fail "$host cannot clone branch '$branch' of $url: push it, give $host access to it, or send the code with --sync"
  fi
  cd "$dir"
  [ -e .git ] || fail "'$dir' on $host is no git clone: --sync, or another --dir"
  changed="$(git status --porcelain --untracked-files=no)"
  [ -z "$changed" ] || fail "'$dir' on $host has changes of its own: --sync, another --dir, or undo them there
$changed"
  git fetch --quiet origin "+refs/heads/$branch:refs/remotes/origin/$branch" ||
    fail "$host cannot fetch branch '$branch': push it, give $host access to it, or send the code with --sync"
  git checkout --quiet "$branch" --
  git merge --quiet --ff-only "origin/$branch" ||
    fail "branch '$branch' was rewritten, or has commits of its own on $host: another --dir, or reset it there"
  printf 'commit: %s\n' "$(git rev-parse HEAD)"
}

host_forget() { # what an earlier --sync sent and this one did not is deleted, and nothing else
  local sent=runs/.sessions/sent
  cd "$dir"
  LC_ALL=C sort -z "$sent.new" -o "$sent.new"
  [ ! -f "$sent" ] || LC_ALL=C comm -z -23 "$sent" "$sent.new" | xargs -0 -r rm -f --
  mv "$sent.new" "$sent"
}

host_torch() { # exits if torch does not see the GPU, with the reason
  local found driver
  found="$(CUDA_VISIBLE_DEVICES="$gpus" "$python" -W ignore -c '
import torch
print(torch.__version__, torch.version.cuda, torch.cuda.is_available())')"
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
  case $found in
    *True) return 0 ;;
    *None*) fail "torch ${found%% *} is built without CUDA: take another build in pyproject.toml, or add --cpu" ;;
  esac
  found="${found% *}"
  fail "torch ${found% *} is built for CUDA ${found##* } and does not see the GPU of $host, whose driver $driver knows $(
    nvidia-smi | sed -n 's/.*\(CUDA [A-Za-z ]*Version: [0-9.]*\).*/\1/p'
  ): install a newer driver (CUDA 13 needs 580, CUDA 12 needs 525), or a torch built for that CUDA in pyproject.toml"
}

host_start() { # starts command, the script and its arguments, in the session; waits until it trains or has ended
  local folder="runs/.sessions/$session" python launcher=() name since=1 run=""
  host_cd
  [ -f "${command[0]}" ] || fail "there is no '${command[0]}' in $dir on $host: push it, or --sync"
  if host_running; then fail "session '$session' runs on $host already: stop it, or give another --session"; fi
  host_gpus
  uv sync --locked || fail "uv sync --locked fails on $host, see above"
  python="$(uv run --no-sync python -c 'import sys; print(sys.executable)')"
  [ -n "$cpu" ] || host_torch
  if [ -n "$hf_home" ]; then
    hf_home="${hf_home/#\~\//$HOME/}"
    mkdir -p "$hf_home" || fail "cannot make HF_HOME '$hf_home' on $host: give --hf-home, or mend HF_HOME in .env"
  fi
  if [ "${num_gpus:-1}" -gt 1 ]; then # every value is given, so that accelerate has nothing to guess or to look up
    launcher=(-m accelerate.commands.launch --multi_gpu --num_processes "$num_gpus" --num_machines 1
      --mixed_precision no --dynamo_backend no --main_process_port 0)
  fi
  mkdir -p "$folder"
  [ "$resumed" -eq 1 ] || [ ! -f "$folder/log" ] || mv "$folder/log" "$folder/log.before"
  touch "$folder/log"
  since=$(($(wc -l <"$folder/log") + 1))
  rm -f "$folder/exit_code" "$folder/pid"
  printf '%s\n' "$gpus" >"$folder/gpus"
  { # for resume: what was given then, unless something else is given now
    printf 'script=%q\n' "${command[0]}"
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
    # wait for it, and the exit code for the log, but not for a process that the script left behind.
    printf 'exec > >(trap "" INT TERM HUP; exec tee -a %q) 2>&1\n' "$folder/log"
    # shellcheck disable=SC2016 # for the shell that runs it
    printf 'log=$!\ntrap : INT TERM HUP\n(echo "$BASHPID" >%q; exec %s)\ncode=$?\nexec >&- 2>&-\n' "$folder/pid" \
      "$(printf '%q ' "$python" ${launcher[@]+"${launcher[@]}"} "${command[@]}")"
    # shellcheck disable=SC2016
    printf 'for _ in {1..30}; do kill -0 "$log" && sleep 0.1 || break; done\necho "$code" >%q\n' "$folder/exit_code"
  } >"$folder/job.sh"
  # Whatever the user's tmux.conf says: the session ends when the script does, and not when nobody looks at it.
  tmux new-session -d -s "$session" -x 200 -y 50 "exec bash '$PWD/$folder/job.sh'" \; \
    set-option destroy-unattached off \; set-option -w remain-on-exit off
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

host_resume() { # the session's script, with --resume and the run folder that its log names
  local folder run script=""
  host_cd
  host_choose_session
  if host_running; then fail "session '$session' still runs on $host: nothing to resume"; fi
  # shellcheck disable=SC1091
  . "$folder/settings"
  uv sync --locked --quiet || fail "uv sync --locked fails on $host, see above"
  [[ "$(uv run --no-sync python "$script" --help 2>&1)" == *--resume* ]] ||
    fail "$script has no --resume: launch it again with the same arguments"
  run="$(host_run_folder)"
  [ -n "$run" ] || fail "session '$session' made no run folder: launch it again"
  resumed=1
  command=("$script" --resume "$run" ${command[@]+"${command[@]}"})
  host_start
}

host_attachable() { # prints the session's name
  host_cd
  host_choose_session
  host_running || fail "session '$session' on $host $(host_state): ./remote_train.sh logs $session"
  printf 'session: %s\n' "$session"
}

host_status() {
  local folder run
  host_cd
  host_choose_session
  printf '%s: %s\n' "$session" "$(host_state)"
  run="$(host_run_folder)"
  if [ -z "$run" ]; then
    printf 'no run folder yet\n'
    tail -n 3 "$folder/log"
  else
    printf '%s\n' "$run"
    tail -n 1 "$run/metrics.jsonl" 2>/dev/null || printf 'no metrics yet\n'
  fi
  if [ -n "$(cat "$folder/gpus")" ]; then
    nvidia-smi -i "$(cat "$folder/gpus")" --format=csv,noheader \
      --query-gpu=index,name,utilization.gpu,memory.used,memory.total || true
  else
    printf 'on the CPU\n'
  fi
}

host_logs() {
  local folder
  host_cd
  host_choose_session
  if [ "$follow" -eq 1 ] && host_running; then
    tail -n 100 -f --pid="$(cat "$folder/pid")" "$folder/log"
    for _ in $(seq 20); do if host_running; then sleep 0.1; fi; done
    printf '%s: %s\n' "$session" "$(host_state)"
  else
    cat "$folder/log"
  fi
}

host_stop() {
  local folder
  host_cd
  host_choose_session
  host_running || fail "session '$session' on $host $(host_state)"
  kill -TERM "$(cat "$folder/pid")"
  printf '%s: SIGTERM sent, waiting\n' "$session"
  for _ in $(seq 240); do
    if ! host_running; then
      grep '^saved; to continue' "$folder/log" | tail -n 1 || tail -n 3 "$folder/log"
      printf '%s: %s\n' "$session" "$(host_state)"
      return 0
    fi
    sleep 0.5
  done
  fail "session '$session' still runs after two minutes: look at it with attach; process $(cat "$folder/pid") on $host"
}

host_find_run() { # prints the absolute path of the run folder to fetch
  local folder
  host_cd
  if [ -z "$run" ]; then
    host_choose_session
    run="$(host_run_folder)"
    [ -n "$run" ] || fail "session '$session' made no run folder"
  fi
  [ -d "$run" ] || run="runs/$run"
  [ -d "$run" ] || fail "there is no run folder '$run' in $dir on $host"
  printf 'folder: %s\n' "$(cd "$run" && pwd)"
}

host_list() {
  local folder
  host_cd
  for folder in runs/.sessions/*/; do
    [ -f "$folder/job.sh" ] || continue
    folder="${folder%/}"
    session="${folder##*/}"
    printf '%s: %s; %s\n' "$session" "$(host_state)" "$(host_run_folder)"
  done
}

# ----------------------------------------------------------------------------------------------------------------------
# Here

connect() {
  [ -n "$host" ] || fail "no machine: put REMOTE_HOST=user@host into .env, or give --host"
  case $host in -* | *[!A-Za-z0-9._@:%-]*) fail "'$host' is no host: --host takes user@host or a name from ssh's config" ;; esac
  case $dir in "" | -* | *[!A-Za-z0-9._/~-]*) fail "'$dir' is no folder's name: --dir takes letters, digits and ._/-" ;; esac
  case $session in *[!A-Za-z0-9_-]*) fail "'$session' is no session's name: it has letters, digits, _ and -" ;; esac
  case $num_gpus in *[!0-9]* | 0*) fail "'$num_gpus' is no number of processes: --num-gpus takes 1, 2, ..." ;; esac
  ssh=(ssh -o ConnectTimeout=10 -o ServerAliveInterval=15)
  scratch="$(mktemp -d /tmp/remote_train.XXXXXX)" # a socket's path must be short
  trap '"${ssh[@]}" -o ControlPath="$scratch/ssh" -O exit "$host" 2>/dev/null || true; rm -rf "$scratch"' EXIT
  # One connection for all that follows, so one passphrase, unless the user shares connections already.
  if ! ssh -G "$host" 2>/dev/null | grep -i '^controlpath ' | grep -qvi ' none$'; then
    ssh+=(-o ControlMaster=auto -o "ControlPath=$scratch/ssh" -o ControlPersist=60)
  fi
}

on_host() { # on_host FUNCTION: runs a host_ function there
  local code=0 name
  {
    printf 'set -euo pipefail\n'
    # shellcheck disable=SC2046 # names of functions
    declare -f fail $(compgen -A function host_)
    for name in action flags host dir session run branch url commit code_tool hf_home num_gpus cpu force follow; do
      printf '%s=%q\n' "$name" "${!name}"
    done
    printf 'gpus="" resumed=0 command=(%s)\n' "$([ ${#command[@]} -eq 0 ] || printf '%q ' "${command[@]}")"
    printf '{ %s </dev/null; exit; }\n' "$1"
  } | "${ssh[@]}" "$host" 'exec bash -s' || code=$?
  [ "$code" -ne 255 ] || fail "no connection to '$host': try ssh $host; the machine is --host, or REMOTE_HOST in .env"
  return "$code"
}

ask_host() { # ask_host FUNCTION KEY: the value of its line "KEY: value"; what the login shell there may print is ignored
  local printed
  printed="$(on_host "$1")" || return # set -e does not hold in $( )
  printf '%s\n' "$printed" | sed -n "s/^$2: //p" | tail -n 1
}

bring_code() { # the code, if it is to change, and .env, if it was asked for
  local name pulled own
  if [ "$code_tool" = rsync ]; then
    git ls-files -coz --exclude-standard | while IFS= read -r -d '' name; do
      if [ "$name" != .env ] && { [ -e "$name" ] || [ -L "$name" ]; }; then printf '%s\0' "$name"; fi
    done >"$scratch/sent.new"
    # Not -a: files that belong to a user of this machine there would be refused by git.
    rsync -lptz -e "${ssh[*]}" --from0 --files-from="$scratch/sent.new" ./ "$host:$dir/"
    rsync -tz -e "${ssh[*]}" "$scratch/sent.new" "$host:$dir/runs/.sessions/"
    on_host host_forget
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
    commit="$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || true)"
  elif [ "$code_tool" = git ]; then
    url="$(git remote get-url origin 2>/dev/null)" || fail "there is no git remote 'origin' to pull from: --sync"
    url="$(printf '%s' "$url" | sed 's|^\(https*://\)[^/@]*@|\1|')" # a password in it stays here
    [ -n "$branch" ] || branch="$(git symbolic-ref --quiet --short HEAD)" || fail "on no branch: --branch B, or --sync"
    changed="$(git status --porcelain --untracked-files=no && git ls-files --others --exclude-standard -- "$@")"
    [ -z "$changed" ] || [ "$branch_given" -eq 1 ] ||
      fail "this would not get there: commit and push it, or send the tree as it is with --sync
$changed"
  fi
}

launch() {
  local script="${command[0]:-}"
  [ -n "$script" ] || fail "which script? ./remote_train.sh launch SCRIPT; see --help"
  [ -f "$script" ] || [ "$branch_given" -eq 1 ] || fail "there is no '$script' here"
  [ -n "$session" ] || session="$(basename "$script" .py | tr -c 'A-Za-z0-9_\n-' _)"
  check_code "$script"
  connect
  dir="$(ask_host host_check folder)"
  bring_code
  on_host host_start
}

resume() {
  check_code
  connect
  dir="$(ask_host host_check folder)"
  bring_code
  on_host host_resume
}

attach() {
  connect
  session="$(ask_host host_attachable session)"
  # The terminal may be one that the machine has not heard of.
  "${ssh[@]}" -t "$host" "sh -c 'infocmp >/dev/null 2>&1 || export TERM=xterm-256color; exec tmux -u attach -t \"=$session\"'"
}

fetch() {
  local without=()
  connect
  dir="$(ask_host host_find_run folder)"
  case $dir in *[!A-Za-z0-9._/-]*) fail "'$dir' has other characters than letters, digits and ._/-" ;; esac
  mkdir -p "runs/${dir##*/}"
  [ "$checkpoints" -eq 1 ] || without=(--exclude=checkpoints/)
  # 24: a file that the run has replaced meanwhile
  rsync -rltz -e "${ssh[*]}" ${without[@]+"${without[@]}"} "$host:$dir/" "runs/${dir##*/}/" || [ $? -eq 24 ]
  printf 'runs/%s\n' "${dir##*/}"
}

main() {
  local script
  cd "$(dirname "${BASH_SOURCE[0]}")"
  [ $# -gt 0 ] || { usage >&2 && exit 2; }
  host="$(setting REMOTE_HOST)" dir="$(setting REMOTE_DIR)" hf_home="$(setting HF_HOME)" flags=""
  action="" session="" run="" branch="" url="" commit="" num_gpus="" cpu="" command=()
  code_tool="" branch_given=0 copy_env=0 force=0 follow=0 checkpoints=0
  [ -n "$dir" ] || dir="$(basename "$PWD")"
  while [ $# -gt 0 ]; do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
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
          fetch:*) run="$1" ;;
          resume:*) session="$1" && shift && break ;;
          *) session="$1" ;;
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
  if [ "$action" = launch ] || [ "$action" = resume ]; then command=("$@"); fi
  case "$action $session" in # a run folder, perhaps of a run that no session began
    resume\ *__*)
      run="$session" session=""
      case $run in */*) ;; *) run="runs/$run" ;; esac
      script="${run##*/}"
      command=("${script%%__*}.py" --resume "$run" ${command[@]+"${command[@]}"})
      action=launch
      ;;
  esac
  case $action in
    launch | resume | attach | fetch) "$action" ;;
    *)
      connect
      on_host "host_$action"
      ;;
  esac
}

main "$@"
