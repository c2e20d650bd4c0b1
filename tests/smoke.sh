#!/bin/sh
# Whether what was built works on this machine: tests/smoke.sh [DIRECTORY].  "make smoke" does.
#
# The programs are in that directory, and so is tests/load, a client.  Besides these it needs a
# shell, and takes some seconds.  RUN, if set, runs what was built for another processor:
#
#	make smoke BUILD=build/arm CC=arm-linux-gnueabihf-gcc LDFLAGS=-static RUN=qemu-arm

set -eu
build=$(cd "${1:-.}" && pwd)
dir=$(mktemp -d)
cd "$dir"
servers=' '

finish() {
	status=$?
	trap - EXIT
	[ "$servers" = ' ' ] || kill -9 $servers 2>/dev/null || true
	if [ $status -ne 0 ]; then
		echo "smoke: failed"
		cat ./*.log said
	fi
	cd / && rm -rf "$dir"
	exit $status
} >&2
trap finish EXIT
trap 'exit 1' INT TERM
: >said

program() {
	name=$1
	shift
	${RUN:-} "$build/$name" "$@"
}

load() {
	program tests/load --size 8M --connections 2 --depth 8 --count 2000 "$@" >said 2>&1
}

# await COMMAND...: until it succeeds.
await() {
	tries=0
	until "$@"; do
		tries=$((tries + 1))
		[ $tries -lt 300 ]
		sleep 0.1
	done
}

# serve NAME OPTIONS...: a server on the Unix socket NAME, and on a TCP port.
serve() {
	name=$1
	shift
	rm -f "$name.log"
	${RUN:-} "$build/xnbd-server" --unix "$name" --laddr 127.0.0.1 --lport 0 "$@" 2>"$name.log" &
	servers="$servers$! "
	eval "pid_$name=$!"
	await grep -qs "listening on 127.0.0.1:" "$name.log"
}

port() {
	sed -n 's/.*listening on 127.0.0.1:\([0-9]*\)$/\1/p' "$1.log"
}

# end NAME SIGNAL STATUS
end() {
	eval "pid=\$pid_$1"
	kill -"$2" "$pid"
	status=0
	wait "$pid" 2>/dev/null || status=$?		# a shell says who was killed
	servers="${servers%% "$pid" *} ${servers#* "$pid" }"
	[ $status -eq "$3" ]
}

stop() {
	end "$1" TERM 0
}

# control NAME COMMAND...
control() {
	name=$1
	shift
	program xnbd-bgctl "$@" "$name.ctl" >said
}

# copy NAME FILE: what that server exports, by a proxy that becomes a target.
copy() {
	rm -f "$2" copied.*
	serve copy --proxy 127.0.0.1 "$(port "$1")" "$2" copied.map copied.ctl
	control copied --cache-all
	control copied --switch
	stop copy
}

# refused STATUS PROGRAM ARGUMENTS...: in one line.
refused() {
	expected=$1 status=0
	shift
	program "$@" >said 2>&1 || status=$?
	[ $status -eq "$expected" ] && [ "$(grep -c . said)" -eq 1 ]
}

fails() {
	if "$@"; then
		return 1
	fi
}

step() {
	echo "smoke: $*"
}

step "the programs run: $(program xnbd-server --version), $(program xnbd-bgctl --version)"

step 'what is wrong is refused'
refused 2 xnbd-server --target --readonly=yes disk
refused 1 xnbd-server --target --unix none nowhere
refused 1 xnbd-bgctl --query nowhere

step 'a target is read and written'
load --make-image disk
cp disk before
serve target --target --ctl target.ctl disk
load --verify --read-percent 50 --flush-every 50 --structured unix:target
copy target copied
cmp disk copied
fails cmp -s disk before

step 'a snapshot is made'
control target --snapshot
cmp disk "$(cat said)"
stop target

step 'an image is created'
serve new --target --create 3M new.img
copy new copied
head -c 3145728 /dev/zero | cmp - copied
stop new

step 'an overlay keeps what is written after kill -9, and the base stays as it is'
cp before base
serve cow --cow-target --cow-file overlay base
load --verify --read-percent 50 unix:cow
copy cow written
end cow KILL 137
cmp base before
serve cow --cow-target --cow-file overlay base
copy cow copied
cmp written copied
stop cow

step 'a read-only target refuses writes'
serve origin --target --readonly before
fails load --read-percent 0 unix:origin

step 'a proxy caches, keeps what it has after kill -9, and becomes a target'
set -- --proxy 127.0.0.1 "$(port origin)" cache map proxy.ctl
serve proxy "$@"
load --verify --read-percent 50 unix:proxy
copy proxy written
end proxy KILL 137
serve proxy "$@"
control proxy --cache-all
control proxy --switch
control proxy --query
grep -q '^mode: target$' said
stop origin
copy proxy copied
cmp written copied
stop proxy
cmp written cache

step 'a daemon starts and ends'
program xnbd-server --target --unix daemon --daemonize --pidfile pid --logpath daemon.log before
load --verify unix:daemon
kill "$(cat pid)"
await test ! -e pid
step passed
