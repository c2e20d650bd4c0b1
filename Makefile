# xnbd: see README.md.  The programs need a C11 compiler and libc, nothing else.
#
#   make                    build
#   make check              build and test (needs python3-pytest and qemu-utils)
#   make smoke              the same in seconds, with a shell alone; RUN=qemu-arm for other processors
#   make asan, make tsan    the same with sanitizers
#   make static             static programs in build/static, with musl-gcc
#   make PORTABLE=1         in build/portable, without what only Linux has
#   make coverage           which lines and branches the tests reach
#   make mutants            whether the tests notice the faults of others (hours)
#   make fuzz               hostile input: FUZZ_SECONDS=3600 for an hour of each kind
#   make bench              compare with other servers, and "make footprint": memory, size, growth
#   make install            DESTDIR and PREFIX are honoured
#   make dist, make deb     a tarball of what is committed, and a Debian package made from it
#   make portability        build and test with other compilers, C libraries and processors

PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man
BASHDIR = $(PREFIX)/share/bash-completion/completions
ZSHDIR = $(PREFIX)/share/zsh/site-functions
EXAMPLEDIR = $(PREFIX)/share/doc/xnbd/examples

CC = cc
CFLAGS = -O2 -g -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
LDFLAGS =

# What the code needs whatever CFLAGS the user gives.
XCFLAGS = -std=c11 -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64 -Wall -Wextra -Wshadow \
	-Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wwrite-strings -pthread -MMD -MP

# Hardening, before CFLAGS and LDFLAGS, which can take it back: -fno-stack-protector, -no-pie.
HARDEN_CFLAGS = -fPIE -fstack-protector-strong
HARDEN_LDFLAGS = $(if $(filter -static,$(LDFLAGS)),,-pie) -Wl,-z,relro,-z,now

# Objects and programs go here; "make asan" and the like use folders of their own.
ifdef PORTABLE
BUILD = build/portable
XCFLAGS += -DXNBD_PORTABLE
else
BUILD = .
endif

# Atomic 64-bit numbers on processors that have none: an archive, of which is taken what is used.
LIBATOMIC = $(filter /%,$(shell $(CC) -print-file-name=libatomic.a))

SERVER_OBJS = xnbd.o options.o exports.o access.o confine.o listen.o clients.o conn.o loop.o \
	proto.o backend.o disk.o snapshot.o stats.o target.o layer.o bitmap.o order.o worker.o \
	buffer.o log.o util.o control.o ctl.o cache.o fetch.o copy.o origin.o proto_client.o
BGCTL_OBJS = bgctl.o options.o access.o proto.o stats.o loop.o log.o util.o

OBJS = $(addprefix $(BUILD)/,$(SERVER_OBJS))
PROGRAMS = $(BUILD)/xnbd-server $(BUILD)/xnbd-bgctl

PYTHON = python3
CHECKFLAGS =
BENCHFLAGS =
FOOTPRINTFLAGS =
FUZZ_SECONDS = 60
MUTANTFLAGS =

all: $(PROGRAMS)

$(BUILD)/xnbd-server: $(OBJS)
	$(CC) $(CFLAGS) -pthread $(HARDEN_LDFLAGS) $(LDFLAGS) -o $@ $(OBJS) $(LIBATOMIC)

$(BUILD)/xnbd-bgctl: $(addprefix $(BUILD)/,$(BGCTL_OBJS))
	$(CC) $(CFLAGS) -pthread $(HARDEN_LDFLAGS) $(LDFLAGS) -o $@ $^ $(LIBATOMIC)

$(BUILD)/%.o: %.c
	@mkdir -p $(BUILD)
	$(CC) $(CPPFLAGS) $(XCFLAGS) $(HARDEN_CFLAGS) $(CFLAGS) -c -o $@ $<

-include $(OBJS:.o=.d) $(BUILD)/bgctl.d

check: $(PROGRAMS)
	XNBD_SERVER=$(abspath $(BUILD)/xnbd-server) tests/run $(CHECKFLAGS)

smoke: $(PROGRAMS) $(BUILD)/tests/load
	RUN='$(RUN)' tests/smoke.sh $(BUILD)

SANITIZE = -O1 -g -fno-omit-frame-pointer -DXNBD_INSTRUMENTED

asan:
	$(MAKE) BUILD=build/asan all \
		CFLAGS='$(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=undefined'
	XNBD_SANITIZED=1 $(MAKE) BUILD=build/asan -o build/asan/xnbd-server -o build/asan/xnbd-bgctl check

# A second signal ends the server at once, threads and all: no leak.
tsan:
	$(MAKE) BUILD=build/tsan all CFLAGS='$(SANITIZE) -fsanitize=thread'
	XNBD_SANITIZED=1 TSAN_OPTIONS=report_thread_leaks=0 \
		$(MAKE) BUILD=build/tsan -o build/tsan/xnbd-server -o build/tsan/xnbd-bgctl check

# What a process that _exit()s or is killed has counted is lost, and what counts makes calls of its
# own, which tests/test_faults.py may complain of.
coverage:
	rm -rf build/coverage
	$(MAKE) BUILD=build/coverage all CFLAGS='-O1 -g --coverage -fprofile-update=atomic -DXNBD_INSTRUMENTED'
	-$(MAKE) BUILD=build/coverage -o build/coverage/xnbd-server -o build/coverage/xnbd-bgctl check
	gcov -b -n -r -o build/coverage build/coverage/*.gcda | \
		sed -n "/^File '[a-z_]*\.[ch]'/{N;N;N;s/\n/  /gp}"

mutants:
	$(PYTHON) tests/mutants.py $(MUTANTFLAGS)

# What is found stays in build/fuzz/found, and the inputs that lead somewhere in build/fuzz/corpus.
fuzz:
	$(MAKE) BUILD=build/asan all \
		CFLAGS='$(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=undefined'
	XNBD_SANITIZED=1 XNBD_FUZZ_SECONDS=$(FUZZ_SECONDS) XNBD_FUZZ_DIR=$(abspath build/fuzz) \
		XNBD_SERVER=$(abspath build/asan/xnbd-server) PYTHON=$(PYTHON) \
		tests/run -k test_fuzz -rP

# A static PIE: musl's rcrt1.o relocates it.  It is named here, since musl-gcc knows no -static-pie,
# and would link the start files of a dynamic program.  Nothing unwinds: no tables for that.
STATIC_CC = musl-gcc
STATIC_BUILD = build/static
STATIC_CFLAGS = -Os -flto=auto -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables \
	-D_FORTIFY_SOURCE=2
STATIC_LDFLAGS = -nostartfiles -l:rcrt1.o -static -Wl,-pie,--no-dynamic-linker,-z,text,-z,noseparate-code \
	-Wl,--gc-sections -s

static:
	$(MAKE) BUILD=$(STATIC_BUILD) CC=$(STATIC_CC) CFLAGS='$(STATIC_CFLAGS)' \
		LDFLAGS='$(STATIC_LDFLAGS)' all

$(BUILD)/tests/load: tests/load.c
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) -std=c11 -Wall -Wextra -pthread -O2 -g $(LDFLAGS) -o $@ $< $(LIBATOMIC)

bench: all static tests/load
	$(PYTHON) tests/bench.py $(BENCHFLAGS)
	$(PYTHON) tests/footprint.py $(FOOTPRINTFLAGS)

footprint: all static tests/load
	$(PYTHON) tests/footprint.py $(FOOTPRINTFLAGS)

# Examples of services; the path of the program in them is where it is installed.
EXAMPLES = $(wildcard contrib/systemd/*) contrib/inetd.conf contrib/xnbd.init

install: all
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(SBINDIR) $(addprefix $(DESTDIR)$(MANDIR)/man,1 5 8) \
		$(DESTDIR)$(BASHDIR) $(DESTDIR)$(ZSHDIR) $(DESTDIR)$(EXAMPLEDIR)
	install -m 755 $(BUILD)/xnbd-bgctl $(DESTDIR)$(BINDIR)
	install -m 755 $(BUILD)/xnbd-server $(DESTDIR)$(SBINDIR)
	install -m 644 man/xnbd-bgctl.1 $(DESTDIR)$(MANDIR)/man1
	install -m 644 man/xnbd-bitmap.5 $(DESTDIR)$(MANDIR)/man5
	install -m 644 man/xnbd-server.8 $(DESTDIR)$(MANDIR)/man8
	install -m 644 contrib/completion.bash $(DESTDIR)$(BASHDIR)/xnbd-server
	install -m 644 contrib/completion.bash $(DESTDIR)$(BASHDIR)/xnbd-bgctl
	install -m 644 contrib/completion.zsh $(DESTDIR)$(ZSHDIR)/_xnbd
	for file in $(EXAMPLES); do \
		sed 's|/usr/sbin/xnbd|$(SBINDIR)/xnbd|' $$file \
			>$(DESTDIR)$(EXAMPLEDIR)/$${file##*/} || exit 1; \
	done

uninstall:
	rm -f $(DESTDIR)$(SBINDIR)/xnbd-server $(DESTDIR)$(BINDIR)/xnbd-bgctl \
		$(DESTDIR)$(MANDIR)/man1/xnbd-bgctl.1 $(DESTDIR)$(MANDIR)/man5/xnbd-bitmap.5 \
		$(DESTDIR)$(MANDIR)/man8/xnbd-server.8 $(DESTDIR)$(BASHDIR)/xnbd-server \
		$(DESTDIR)$(BASHDIR)/xnbd-bgctl $(DESTDIR)$(ZSHDIR)/_xnbd \
		$(addprefix $(DESTDIR)$(EXAMPLEDIR)/,$(notdir $(EXAMPLES)))
	-rmdir $(DESTDIR)$(EXAMPLEDIR) $(dir $(DESTDIR)$(EXAMPLEDIR))

VERSION = $(shell sed -n 's/^.define XNBD_VERSION "\([0-9.]*\)".*/\1/p' xnbd.h)
TARBALL = build/xnbd-$(VERSION).tar

# What is committed, byte for byte the same wherever and whenever it is made.
dist:
	mkdir -p build
	git archive --prefix=xnbd-$(VERSION)/ -o $(TARBALL) HEAD
	gzip -9nf $(TARBALL)

# A Debian package, from that tarball.
deb: dist
	rm -rf build/deb
	mkdir -p build/deb
	tar -xzf $(TARBALL).gz -C build/deb
	cp -r build/deb/xnbd-$(VERSION)/contrib/debian build/deb/xnbd-$(VERSION)/debian
	sed -i '1s/(.*)/($(VERSION)-1)/' build/deb/xnbd-$(VERSION)/debian/changelog
	cd build/deb/xnbd-$(VERSION) && dpkg-buildpackage -b -us -uc

# Other compilers, C libraries and processors.
portability:
	PYTHON=$(PYTHON) tests/portability

clean:
	rm -rf xnbd-server xnbd-bgctl *.o *.d build tests/load tests/__pycache__ .pytest_cache

.PHONY: all check smoke asan tsan coverage mutants fuzz static bench footprint install uninstall dist deb portability clean
