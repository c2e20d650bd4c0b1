# Functions for the scripts of vm.py.  They run under busybox's sh and tools in
# the virtual machine, and under those of the distribution on a real one.
# shellcheck shell=sh

# $TREE on the mounted file system.
copy_tree() {
	cp -R "$TREE" "$MNT/tree"
}

verify_tree() {
	(cd "$MNT/tree" && md5sum -c "$TREE/../sums") >"$TMP/verify.log" || {
		grep -v ': OK$' "$TMP/verify.log"
		return 1
	}
}

# await SECONDS COMMAND...: polls until the command succeeds.
await() {
	tries=$(($1 * 10))
	shift
	until "$@"; do
		tries=$((tries - 1))
		if [ "$tries" -le 0 ]; then
			echo "waited in vain for: $*"
			return 1
		fi
		sleep 0.1
	done
}

connected() {
	[ -e "/sys/block/${1##*/}/pid" ]
}

disconnected() {
	! connected "$1"
}

has_size() {
	[ "$(blockdev --getsize64 "$1")" != 0 ]
}

# attach DEVICE CLIENT [OPTIONS...]: connects to the server at $HOST and $PORT
# with nbd-client, or with busybox's applet of that name.
attach() {
	earlier=$(kernel_complaints | head -c 900)
	for try in 1 2 3 4 5 6 7 8; do
		connect "$@" || return 1
		if await 2 all_receive; then
			await 10 has_size "$1" && await 10 settled "$1"
			return
		fi
		echo "try $try: the kernel has no thread for each connection"
		detach "$1" "$2" || return 1
		# What it complained of now was not the server's fault.
		mark_kernel_log
		[ -z "$earlier" ] || echo "$earlier" >/dev/kmsg
	done
	return 1
}

connect() {
	dev=$1 client=$2
	shift 2
	case $client in
	busybox) "$BUSYBOX" nbd-client "$@" "$HOST" "$PORT" "$dev" ;;
	debian) nbd-client "$HOST" "$PORT" "$dev" "$@" ;;
	esac </dev/null >"$TMP/attach.log" 2>&1 || {
		cat "$TMP/attach.log"
		return 1
	}
	await 10 connected "$dev"
}

# The kernel receives from each connection in a worker of its own, which does not
# end before the connection does.  Where it takes more than some 10 ms to make the
# workers, as it may on an emulated processor, the queue's rescuer takes all that
# waits, one after the other: then nobody receives from any but the first.
all_receive() {
	[ "$(grep -l recv_work /proc/[0-9]*/stack 2>/dev/null | wc -l)" -ge "$(connections)" ]
}

# The clients leave a process behind that opens the device once, up to a second
# later, which a test that was faster would hear of as an I/O error.
settled() {
	name="${1%?}[${1#"${1%?}"}]"	# so that it does not find itself
	cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | grep -x "$name" >"$TMP/users"
	[ "$(wc -l <"$TMP/users")" -le 1 ]
}

# detach DEVICE CLIENT
detach() {
	case $2 in
	busybox) "$BUSYBOX" nbd-client -d "$1" ;;
	debian) nbd-client -d "$1" ;;
	esac >"$TMP/detach.log" 2>&1 || {
		cat "$TMP/detach.log"
		return 1
	}
	await 10 disconnected "$1"
}

# How many connections to $PORT are established.
connections() {
	awk -v port="$(printf ':%04X$' "$PORT")" \
		'$3 ~ port && $4 == "01"' /proc/net/tcp | wc -l
}

# What the kernel remarks from now on is this test's.
mark_kernel_log() {
	echo "xnbd test begins" >/dev/kmsg
}

# What it remarked since then that a good server gives no cause for.
kernel_complaints() {
	# shellcheck disable=SC2016
	dmesg | sed -n 'H; /xnbd test begins/h; ${g;p;}' | grep -E \
		-e '(Receive|Send) (control|data)|Unexpected|Other side|[Ww]rong' \
		-e 'Double|[Tt]imed out|stuck|I/O error|EXT4-fs (error|warning)' \
		-e 'BUG|WARNING|Call Trace|blocked for more' || true
}

# Leaves nothing mounted and nothing connected, whatever state a test left.
cleanup() {
	umount "$MNT" 2>/dev/null || umount -l "$MNT" 2>/dev/null || true
	for dev in "$DEV" "$DEV2"; do
		if ! disconnected "$dev"; then
			swapoff "$dev" 2>/dev/null || true
			nbd-client -d "$dev" >/dev/null 2>&1 || true
			await 10 disconnected "$dev"
		fi
	done
}
