#!/usr/bin/env bash
# Functions named host_* run on the GPU machine. They are sent as text, with their variables quoted by printf %q, to a
# bash that reads its standard input, so nothing in an argument is executed. The others also run in bash 3.2 on macOS.
# shellcheck disable=SC1091,SC2012,SC2016,SC2046 # files and words that only the machine knows; names that are plain
set -euo pipefail

usage() {
  cat <<'END'
Runs a script on the GPU machine, in a tmux session that keeps running when the connection ends.

  ./remote_train.sh [launch] [options] SCRIPT [arguments]    starts SCRIPT in a new session
  ./remote_train.sh attach [SESSION]                         opens its terminal; ctrl-b d leaves it running
  ./remote_train.sh status [SESSION]                         shows its state, step, time left, GPU and last lines
  ./remote_train.sh logs [-f] [SESSION]                      shows what it printed; -f waits for more
  ./remote_train.sh stop [SESSION]                           stops the script, which saves first
  ./remote_train.sh resume [options] [SESSION] [arguments]   continues the run of a session that has ended
  ./remote_train.sh fetch [--checkpoints] [SESSION|RUN]      copies a run folder to runs/ here
  ./remote_train.sh list                                     shows the sessions, the newest first

Without SESSION: the one launched or resumed last. Options come before SCRIPT, or before the SESSION of a resume.
  --host HOST      user@host or a name from ~/.ssh/config; default: REMOTE_HOST in .env
  --dir DIR        the folder there, also for later commands; default: REMOTE_DIR in .env, or this folder's name
  --session NAME   the name of the session; default: the script's name
  --sync           sends the files as they are here, without those that git ignores. Without it, launch uses your
                   last commit, which must be pushed, and resume leaves the code there as it is
  --copy-env       copies .env there too, readable only by you
  --hf-home DIR    Hugging Face's folder there; default: HF_HOME in .env
  --num-gpus N     runs N processes on N free GPUs
  --cpu            for a machine without a GPU
Example: ./remote_train.sh --sync --copy-env --session lr2 grpo.py --learning-rate 2e-5 --track
END
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# On the machine: ~/.remote_train/SESSION@PROJECT has what is known about a session; PROJECT is a hash of its folder.
host_begin() { # sets dir and project; nobody else may read arguments and logs
  PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH" gone=""
  (mkdir -p ~/.remote_train && chmod 700 ~/.remote_train) 2>/dev/null ||
    fail "$HOME/.remote_train on $host is no folder of yours: move it away"
  dir="$(cd && realpath -m -- "$dir")"
  project="$(printf %s "$dir" | sha256sum | cut -c 1-12)"
}

host_running() { tmux has-session -t "=$session@$project" 2>/dev/null; }
host_sessions() { (cd ~/.remote_train && ls -t -- *"@$project/settings" | cut -d @ -f 1) 2>/dev/null || true; }
host_smi() { timeout 30 nvidia-smi --format=csv,noheader "$@"; } # a broken driver may not answer at all
host_steps() { cksum <"$run/metrics.jsonl"; } 2>/dev/null # changes with every step
host_named() { sed -n 's/^run folder: //p; s/^preset .*, in //p' "$folder/log" 2>/dev/null | tail -n 1; } # run folder
host_logs() { tail -n +1 ${follow:+-f --pid="$(cat "$folder/pid")"} "$folder/log"; }

host_state() {
  local state="ended without an exit code (killed, or the machine was restarted)"
  ! host_running || state=running
  [ ! -f "$folder/exit_code" ] || state="ended with exit code $(cat "$folder/exit_code")"
  printf '%s: %s' "$session" "$state"
}

host_choose() { # reads what is known about the session, goes to its project's folder and sets run
  [ -n "$session" ] || read -r session < <(host_sessions) || fail "no session in $dir on $host: launch, or give --dir"
  folder="$HOME/.remote_train/$session@$project"
  [ -f "$folder/settings" ] || fail "there is no session '$session' in $dir on $host: see list, or give --dir"
  . "$folder/settings"
  cd "$folder"
  cd "$dir" 2>/dev/null || gone="the project's folder '$dir' on $host is gone"
  run="$(host_named | grep . || printf '%s' "$run")" # a resumed script may have ended before it named its folder
}

host_gpus() { # sets gpus to the first num_gpus GPUs that no process and no session uses
  local listed users taken index uuid memory free=()
  gpus=""
  [ -z "$cpu" ] || return 0
  listed="$(host_smi --query-gpu=index,uuid,memory.used)" ||
    fail "nvidia-smi fails on $host: install or fix the driver; for a machine without a GPU, add --cpu"
  users="$(host_smi --query-compute-apps=gpu_uuid,pid,process_name)"
  # A script that has just started does not use its GPU yet, but its session says which it has.
  taken=",$(exec 2>/dev/null && cd ~/.remote_train && tmux ls -F '#S/gpus' | xargs -rd '\n' cat | tr '\n' ,)" || true
  while IFS=', ' read -r index uuid memory; do
    # In a container the processes of others cannot be seen, but their memory can, in MiB. Some devices give none.
    if [[ $users != *"$uuid"* && $taken != *",$index,"* && ${memory//[!0-9]/} -lt 2000 ]]; then
      free+=("$index")
    fi
  done <<<"$listed"
  [ "${#free[@]}" -ge "$num_gpus" ] ||
    fail "$host has ${#free[@]} free GPU(s), not $num_gpus: wait, or lower --num-gpus; in use by: ${users:-a session}"
  gpus="$(IFS=, && printf '%s' "${free[*]:0:num_gpus}")"
}

host_check() { # checks what it can before code is sent; prints the project's folder
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh >&2 || true
  for tool in tmux uv "$code_tool"; do
    command -v "$tool" >/dev/null || fail "no $tool on $host: install it there"
  done
  [ "$action" = launch ] || host_choose
  [ "$action" = launch ] || [[ -n $run && -z $gone ]] || fail "${gone:-'$session' made no run folder}: launch again"
  ! host_running || fail "session '$session' runs on $host already: attach to it, stop it, or launch another --session"
  num_gpus="${num_gpus:-1}"
  host_gpus
  (mkdir -p "$dir" && [ -w "$dir" ]) 2>/dev/null || fail "'$dir' on $host is no folder of yours: give another --dir"
  printf '%s\n' "$dir"
}

host_pull() { # checks out the pushed commit without a branch, because a rewritten branch could not be pulled
  export GIT_TERMINAL_PROMPT=0
  cd "$dir"
  [ -e .git ] || git clone --quiet -- "$url" . ||
    fail "$host cannot clone $url into '$dir', see above: give it access, or an empty --dir, or use --sync"
  git fetch --quiet origin || fail "$host cannot fetch $url, see above: give it access, or --sync"
  [ -z "$(git status --porcelain --untracked-files=no)" ] ||
    fail "'$dir' on $host has changes of its own, perhaps from --sync: use --sync again, or another --dir"
  git checkout --quiet --detach "$commit" -- || fail "'$dir' on $host cannot check out your commit, see above: --sync"
}

host_job() { # runs in the session. A signal is for the script, which saves; the log and this shell wait for it.
  trap : INT TERM
  (echo "$BASHPID" >"$folder/pid" && exec "${job[@]}") > >(trap "" INT TERM HUP && exec tee "$folder/log") 2>&1
  code=$?
  sleep 0.5 # for the end of the log
  echo "$code" >"$folder/exit_code"
  if [[ -n $steps && $steps = "$(host_steps)" && $code = [06] && $code = "$(cat "$folder.before/exit_code")" ]]; then
    mv "$folder" "$folder.finished" # no step was left to do, so the session is as it was
    mv "$folder.before" "$folder"
  fi
}

host_start() { # starts the script in the session; waits until it names its folder or has ended
  local python found steps="" launcher=()
  host_check >/dev/null
  [ "$code_tool" != git ] || host_pull
  cd "$dir"
  [[ -z $dotenv || ! -d .env ]] || fail "'$dir/.env' on $host is a folder: move it away"
  [ -z "$dotenv" ] || (umask 077 && printf '%s\n' "$dotenv" >.env.new && mv .env.new .env)
  [ -z "$run" ] || grep -q resume -- "$script" || fail "$script has no --resume: launch it again"
  uv sync --locked || fail "uv sync --locked fails on $host, see above"
  python="$(uv run --no-sync python -c 'import sys; print(sys.executable)')"
  host_gpus # others may have taken some GPUs meanwhile
  [ -n "$cpu" ] || found="$(CUDA_VISIBLE_DEVICES="$gpus" "$python" -c 'import torch; torch.ones(1).cuda()' 2>&1)" ||
    fail "torch does not see the GPU of $host (${found##*$'\n'}): a newer driver, or another torch in pyproject.toml"
  # Every value is given, so accelerate's default_config.yaml has no effect.
  [ "$num_gpus" -eq 1 ] || launcher=(-m accelerate.commands.launch --multi_gpu --num_processes "$num_gpus" --gpu_ids all
    --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0)
  job=(env CUDA_DEVICE_ORDER=PCI_BUS_ID "CUDA_VISIBLE_DEVICES=$gpus" PYTHONUNBUFFERED=1 "WANDB_GIT_COMMIT=$commit"
    ${hf_home:+"HF_HOME=${hf_home/#\~\//$HOME/}"} "$python" "${launcher[@]}" "$script" ${run:+--resume "$run"})
  folder="$HOME/.remote_train/$session@$project"
  mkdir -p "$folder" 2>/dev/null || fail "'$folder' on $host is no folder: move it away, or give another --session"
  [ -z "$run" ] || steps="$(host_steps)" || true
  printf 'starting session %s\n' "$session" # ends here if the connection was lost, so nothing starts unseen
  # tmux refuses a name in use, so only one of two launches continues. Its session sleeps until all is written. Whatever
  # the user's tmux.conf says, it ends when the script does, and not when nobody is attached.
  tmux new-session -d -s "$session@$project" -x 200 -y 50 -c "$PWD" sleep 60 \; set-option destroy-unattached off \; \
    set-option -w remain-on-exit off || fail "tmux refuses session '$session', see above: give another --session"
  rm -rf "$folder".{before,finished}
  cp -pr "$folder" "$folder.before"
  cat "$folder/log" >>"$folder/log.before" 2>/dev/null || true
  rm -f "$folder/log" "$folder/exit_code" "$folder/pid"
  printf '%s\n' "$gpus" >"$folder/gpus"
  {
    printf 'dir=%q script=%q run=%q steps=%q folder=%q gpus=%q\n' "$dir" "$script" "$run" "$steps" "$folder" "$gpus"
    printf '[ -n "$%s" ] || %s=%q\n' cpu{,} "$cpu" num_gpus{,} "$num_gpus" hf_home{,} "$hf_home" commit{,} "$commit"
    printf 'job=(%s)\n' "$(printf '%q ' "${job[@]}" "${command[@]}")"
    declare -f host_steps host_job
  } >"$folder/settings"
  tmux respawn-pane -k -t "=$session@$project:" bash -c '. "$1" && host_job' bash "$folder/settings"
  until [[ -n $(host_named) && $(host_steps) != "${steps:-none}" ]] || ! host_running || ((tries++ == 120)); do
    sleep 0.5
  done
  cat "$folder.finished/log" 2>/dev/null || cat "$folder/log"
  printf '\n%s%s\n' "$(host_state)" "${gpus:+, GPU $gpus}"
  host_running || exit "$(cat "$folder/exit_code" || echo 1)"
  printf 'next: ./remote_train.sh%s status, logs -f, attach, stop, resume or fetch\n' "$given"
}

host_progress() { # says in words how far the run is; a row of metrics has only what its step measured
  cat "$run"/{config.json,metrics.jsonl} 2>/dev/null | awk -F '[{}:, "]+' -v running="$(! host_running || echo 1)" '
    /^[}]?[{]"step"|^ *"num_/ { for (i = 2; i < NF; i++) last[$i] = $(i + 1) } # not the words of a system prompt
    /"eval\/.*accuracy"/ { at = last["step"]; key = /_subset_acc/ ? "eval/train_subset_accuracy" : "eval/accuracy" }
    /"time\/update_s"/ { seconds += last["time/rollout_s"] + last["time/reward_s"] + last["time/update_s"] }
    END {
      if (last["step"] == "") { print "no metrics yet"; exit }
      step = last["step"]
      if (last["num_epochs"]) last["num_steps"] = int(step * last["num_epochs"] / (last["train/epoch"] + !step) + 0.999)
      left = last["num_steps"] - step
      printf "step %d", step
      if (last["num_steps"] > 0 && left >= 0) printf " of %d (%d %%)", last["num_steps"], 100 * step / last["num_steps"]
      if (last["train/reward"] ~ /[0-9]/) printf ", reward %.3f", last["train/reward"]
      if (at != "") printf ", accuracy %.3f at step %d", last[key], at
      print (running && step > 0 && left > 0 ? sprintf(", about %.1f minutes left", left / 60 * seconds / step) : "")
    }' || true
}

host_status() {
  printf '%s\n%s\n' "$(host_state)" "${gone:-${run:-no run folder yet}}"
  [ -n "$gone" ] || host_progress
  [ -z "$gpus" ] || host_smi -i "$gpus" --query-gpu=index,name,utilization.gpu,memory.used,memory.total || true
  printf 'printed, %s seconds ago:\n' $(($(date +%s) - $(date -r "$folder/log" +%s)))
  tail -n 8 "$folder/log"
}

host_stop() {
  host_running || fail "$(host_state) on $host (list shows the others), so there is nothing to stop"
  kill -TERM "$(cat "$folder/pid")" 2>/dev/null || true # another stop may have been faster
  timeout 120 bash -c 'while tmux has-session -t "=$1" 2>/dev/null; do sleep 0.2; done' bash "$session@$project" ||
    fail "session '$session' still runs after two minutes: attach to it"
  tail -n 3 "$folder/log"
  printf '%s; %s\n' "$(host_state)" "${gone:-from here, ./remote_train.sh$given resume $session continues it}"
}

host_fetch() { # prints the folder of a run, of a sweep, or of the session's run
  run="$dir/runs/${session#runs/}"
  [[ -n ${session#runs/} && -d $run ]] || host_choose
  [ -d "$run" ] || fail "session '$session' on $host made no run folder, or it was removed: name another"
  (cd "$run" && pwd)
}

host_list() {
  [ -n "$(host_sessions)" ] || printf "there is no session in '%s' on %s\n" "$dir" "$host"
  for session in $(host_sessions); do
    (host_choose && printf '%s; %s, in %s %s%s\n' "$(host_state)" "$script" "$dir" "$run" "${gone:+; $gone}") || true
  done
}

setting() { # setting NAME: its value in .env, which is read and not executed
  [ ! -f .env ] || sed -nE "s/^[[:space:]]*(export[[:space:]]+)?$1[[:space:]]*=[[:space:]]*//p" .env | tail -n 1 |
    sed -E -e 's/^"([^"]*)".*/\1/' -e t -e "s/^'([^']*)'.*/\1/" -e t -e 's/(^|[[:space:]]+)#.*//' -e 's/[[:space:]]*$//'
}

check_code() { # refuses files that would not get there; sets commit and url
  local word option="" unknown files=(pyproject.toml uv.lock ${script:+"$script"})
  commit="$(git rev-parse --verify HEAD 2>&1)" || fail "no commit here (${commit%%$'\n'*}): clone the project with git"
  for word in ${command[@]+"${command[@]}"}; do # data sets and reward modules; absolute paths are on the machine
    [[ $word != --* ]] || option="${word%%=*}"
    word="${word#--*=}"
    case $option:$word in
      --dataset?path:[!/]* | --test?path:[!/]*) files+=("$word") ;;
      --rewards:*:*) files+=("$(dirname "$script")/$(printf '%s' "${word%%:*}" | tr . /).py") ;;
    esac
  done
  unknown="$(git --literal-pathspecs ls-files --others ${sync:+--ignored --exclude-standard} -- "${files[@]}")"
  [ -z "$unknown" ] || fail "this would not get there: commit and push it, or --sync if git does not ignore it
$unknown"
  [ -z "$sync" ] || return 0
  [ -z "$(git status --porcelain --untracked-files=no)" ] || fail "you have changes: commit and push them, or --sync"
  [ -n "$(git branch -r --contains HEAD)" ] || fail "your last commit is not pushed: git push, or --sync"
  # Your credentials stay here: the machine has its own access, or none.
  url="$(git remote get-url origin | sed -E 's|^(https?://)[^/]*@|\1|; s|^([^/]*://[^/:@]*):[^/]*@|\1@|; s|[?#].*||')"
}

on_host() { # on_host FUNCTION: runs a host_ function there
  local name code=0
  {
    declare -f fail $(compgen -A function host_)
    for name in action host dir session script run url commit code_tool dotenv hf_home num_gpus cpu follow given; do
      printf '%s=%q\n' "$name" "${!name}"
    done
    printf 'command=(%s)\n' "${command[*]+$(printf '%q ' "${command[@]}")}"
    printf '%s\n' 'set -eo pipefail' host_begin "{ $1; exit; } </dev/null"
  } | "${ssh[@]}" "$host" 'exec bash -s' || code=$?
  [ "$code" -ne 255 ] || fail "no connection to '$host', or it was lost: try ssh $host and ./remote_train.sh$given list"
  return "$code"
}

copy() { # rsync over ssh. Its code 24: the run has replaced a file meanwhile
  local said
  said="$(rsync -e "${ssh[*]}" "$@" 2>&1)" || [ $? -eq 24 ] || fail "mend rsync here or on $host: ${said%%$'\n'*}"
}

start() {
  if [ -n "$sync" ]; then # sends what git does not ignore; deletes nothing there
    [ -z "$(git status --porcelain)" ] || commit="$commit-dirty"
    dir="$(on_host host_check | tail -n 1)"
    git ls-files -coz --exclude-standard | while IFS= read -r -d '' name; do
      [ ! -f "$name" ] && [ ! -L "$name" ] || printf './%s\0' "$name"
    done | copy -lptz --from0 --files-from=- --exclude={/.env,/runs,/.venv,/wandb} ./ "$host:$dir/"
  fi
  on_host host_start
}

attach() {
  [ -t 0 ] || fail "attach needs a terminal; ./remote_train.sh logs -f does not"
  session="$(on_host 'host_choose; host_running || fail "$(host_state) on $host: ./remote_train.sh logs shows more"
    printf "%s\n" "$session@$project"' | tail -n 1)"
  # The machine may not know the type of the terminal here.
  TERM=xterm-256color "${ssh[@]}" -t "$host" "exec sh -c 'PATH=\"\$HOME/.local/bin:\$PATH\"
    exec tmux -u attach -t \"=$session\"'"
}

fetch() {
  local folder name without=checkpoints/
  [ -z "$checkpoints" ] || without=/lock
  folder="$(on_host host_fetch | tail -n 1)"
  [[ $folder =~ ^/[A-Za-z0-9._/-]+$ && $folder/ != */../* ]] || fail "'$folder': fetch takes letters, digits, ._/- only"
  name="runs/$(printf %s "$folder" | sed 's|.*/runs/||; s|^/.*/||')"
  mkdir -p "$name" 2>/dev/null || fail "'$name' cannot be made a folder here: move away the file in its place"
  copy -rltuz --exclude=/lock --exclude="$without" "$host:$folder/" "$name/" # -u: not over a run continued here
  printf '%s\n' "$name"
}

main() {
  local name value given=""
  [ $# -gt 0 ] || { usage >&2 && exit 2; }
  trap 'printf "\ninterrupted; what was started there keeps running: ./remote_train.sh list\n" >&2; exit 130' INT
  cd "$(dirname "${BASH_SOURCE[0]}")"
  host="$(setting REMOTE_HOST)" dir="$(setting REMOTE_DIR)" hf_home="$(setting HF_HOME)" action="" session="" script=""
  run="" url="" commit="" code_tool=true dotenv="" num_gpus="" cpu="" sync="" copy_env="" checkpoints="" follow=""
  while [ $# -gt 0 ]; do
    name="${1%%=*}" value=1
    case "$action:$name" in
      *:-h | *:--help) usage && exit ;;
      *:--host | *:--dir | *:--session | *:--hf-home | *:--num-gpus)
        [ "$name" != "$1" ] || set -- "$1=${2:-}" "${@:3}"
        value="${1#*=}"
        [[ ! $name =~ ^--(host|dir)$ ]] || given+=" $1" # for the commands that messages name
        ;;
      *:--sync | *:--copy-env | *:--cpu | *:--checkpoints) ;;
      logs:-f) name=follow ;;
      resume:*) break ;;
      *:-*) fail "unknown option '$1': see --help" ;;
      :launch | :attach | :status | :logs | :stop | :resume | :fetch | :list) name=action value="$1" ;;
      :*.py | launch:*) break ;;
      :*) fail "'$1' is neither a command nor a script: see --help" ;;
      *) name=session value="${session:+$session }${1%.py}" ;;
    esac
    [ -n "$value" ] || fail "$name needs a value: give one, or leave it out"
    name="${name#--}"
    printf -v "${name//-/_}" '%s' "$value" # --hf-home sets hf_home
    shift
  done
  if [[ $action = resume && -z $session && ${1--} != -* ]]; then
    session="$1"
    [ -n "$session" ] || fail "session needs a value: give one, or leave it out"
    shift
  fi
  command=("$@")
  dir="${dir:-${PWD##*/}}" dir="${dir#\~/}"
  if [ "${action:=launch}" = launch ]; then
    [ -f "${1:-}" ] || fail "there is no script '${1:-}' here: see --help"
    script="$1" code_tool=git command=("${@:2}")
    [ -n "$session" ] || session="$(basename "$script" .py | sed 's/[^A-Za-z0-9_-]/_/g; s/^-/_/')"
  fi
  [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9._@:%-]*$ ]] || fail "'$host' is no host: set REMOTE_HOST in .env, or give --host"
  [[ $dir =~ ^[A-Za-z0-9._/][A-Za-z0-9._/-]*$ ]] || fail "'$dir' is no folder's name: --dir takes letters, digits, ._/-"
  [[ $session =~ ^([A-Za-z0-9_][A-Za-z0-9_-]{0,63})?$ || $action = fetch && ! /$session =~ /[./]|[^A-Za-z0-9._/-] ]] ||
    fail "'$session' is no session's name: use up to 64 letters, digits, _ and -, and do not begin with -"
  [[ $num_gpus =~ ^([1-9][0-9]*)?$ ]] || fail "'$num_gpus' is no number of GPUs: --num-gpus takes 1, 2, ..."
  [ -z "$sync" ] || code_tool=rsync
  [[ -z $sync && $action != fetch ]] || command -v rsync >/dev/null || fail "there is no rsync here: install it"
  [ "$code_tool" = true ] || check_code
  [ -z "$copy_env" ] || dotenv="$(cat .env 2>/dev/null)" || fail "--copy-env finds no .env here: see .env.example"
  ssh=(ssh -o ConnectTimeout=10 -o ServerAliveInterval=15)
  case $action in
    launch | resume) start ;;
    attach | fetch) "$action" ;;
    *) on_host "[ $action = list ] || host_choose; host_$action" ;;
  esac
}

main "$@"
