# Sourced by the guest scripts: a store and a daemon, and scenarios that each
# say `ok NAME` or `not ok NAME`. Needs DYSK_BIN (the folder of the binaries).
# shellcheck shell=bash
set -euo pipefail

: "${DYSK_BIN:?names the folder of the binaries}"
work=/tmp/dysk
mkdir -p "$work" /mnt/a /mnt/b
failures=0
passes=0

export AZURE_STORAGE_KEY='Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=='
account=devstoreaccount1

dyskctl() { "$DYSK_BIN/dyskctl" "$@"; }

fail() {
  echo "    $*" >&2
  return 1
}

# eventually SECONDS COMMAND...: waits until the command succeeds.
eventually() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$deadline" ] || fail "not within the time: $*" || return 1
    sleep 0.05
  done
}

# refused TEXT COMMAND...: the command must fail with status 1 and one line on
# stderr that holds TEXT.
refused() {
  local text=$1 status=0 said
  shift
  said=$("$@" 2>&1 >/dev/null) || status=$?
  [ "$status" = 1 ] || fail "status $status, not 1, from: $*: $said" || return 1
  [ "$(printf '%s\n' "$said" | wc -l)" = 1 ] || fail "more than one line: $said" || return 1
  case $said in
  *"$text"*) ;;
  *) fail "\"$said\" does not say \"$text\"" ;;
  esac
}

equal() { [ "$1" = "$2" ] || fail "$3: \"$1\" is not \"$2\""; }

start_store() {
  "$DYSK_BIN/dysk-emulator" --listen 127.0.0.1:0 --memory "$@" >"$work/store.out" 2>"$work/store.log" &
  echo $! >"$work/store.pid"
  eventually 20 grep -q '^listening on' "$work/store.out"
  endpoint=$(sed -n 's/^listening on //p' "$work/store.out")
  store_root=${endpoint%/*}
}

start_daemon() {
  "$DYSK_BIN/dyskd" 2>>"$work/dyskd.log" &
  daemon=$!
  eventually 20 dyskctl version
}

stop_daemon() {
  kill "$daemon"
  local status=0
  wait "$daemon" || status=$?
  equal "$status" 0 "dyskd's exit status"
}

# attach BLOB [OPTION...]: prints the device.
attach() {
  local blob=$1
  shift
  dyskctl attach "$account/dysks/$blob" --endpoint "$endpoint" "$@"
}

is_fenced() { dyskctl status "$1" -o json | grep >/dev/null '"fenced": *"'; }

# moves NAME SECTORS: as many were written to the disk since it was made.
moves() {
  local device
  device=$(readlink "/dev/dysk/$1")
  [ "$(awk '{ print $7 }' "/sys/block/${device#/dev/}/stat")" -gt "$2" ]
}

store_stats() { curl -sf "$store_root/-/stats"; }

nothing_attached() {
  equal "$(dyskctl list -o json | tr -d ' \n')" '[]' "what is attached"
  local left=() device
  for device in /sys/block/nbd*/pid; do
    [ -e "$device" ] && left+=("$device")
  done
  equal "${left[*]}" '' "devices left connected"
}

# scenario NAME: runs the function NAME by itself.
scenario() {
  local from=$EPOCHREALTIME status=0
  (
    set -e
    "$1"
  ) >"$work/scenario.log" 2>&1 || status=$?
  local took
  took=$(awk -v a="$from" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
  if [ "$status" = 0 ]; then
    passes=$((passes + 1))
    echo "ok $1 ($took s)"
    sed -n 's/^figure: /    /p' "$work/scenario.log"
  else
    failures=$((failures + 1))
    echo "not ok $1 ($took s, status $status)"
    sed 's/^/    | /' "$work/scenario.log" | tail -n 40
    tail -n 30 "$work/dyskd.log" | sed 's/^/    dyskd: /'
    # The next scenario starts clean.
    umount -q /mnt/a /mnt/b || true
    dyskctl list -o json | sed -n 's/.*"name": *"\([^"]*\)".*/\1/p' | while read -r name; do
      dyskctl detach "$name" --force || true
    done
  fi
}

finish() {
  echo "$passes passed, $failures failed"
  [ "$failures" = 0 ]
}
