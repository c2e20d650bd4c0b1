# xnbd: see README.md.  The programs need a C11 compiler and libc, nothing else.
#
#   make                    build
#   make check              build and test (installs what the tests need, where it may)
#   make asan, make tsan    the same with sanitizers
#   make static             small static programs in build/static, with musl-gcc
#   make PORTABLE=1         in build/portable, without what only Linux has
#   make bench              compare with other servers
#   make install            DESTDIR and PREFIX are honoured

PREFIX = /usr/local
BINDIR = $(PREFIX)/bin
SBINDIR = $(PREFIX)/sbin
MANDIR = $(PREFIX)/share/man

CC = cc
CFLAGS = -O2 -g
LDFLAGS =

# What the code needs whatever CFLAGS the user gives.
XCFLAGS = -std=c11 -D_FILE_OFFSET_BITS=64 -Wall -Wextra -Wshadow -Wstrict-prototypes \
	-Wmissing-prototypes -Wpointer-arith -Wwrite-strings -pthread -MMD -MP

# Objects and programs go here; "make asan" and the like use folders of their own.
ifdef PORTABLE
BUILD = build/portable
XCFLAGS += -DXNBD_PORTABLE
else
BUILD = .
endif

SERVER_OBJS = xnbd.o options.o listen.o conn.o loop.o tx.o proto.o backend.o disk.o \
	snapshot.o cow.o layer.o bitmap.o range.o commit.o worker.o buffer.o util.o \
	proxy.o ctl.o cache.o fetch.o ahead.o copy.o origin.o link.o dial.o proto_client.o
BGCTL_OBJS = bgctl.o util.o
OBJS = $(addprefix $(BUILD)/,$(SERVER_OBJS))
PROGRAMS = $(BUILD)/xnbd-server $(BUILD)/xnbd-bgctl

PYTHON = python3
CHECKFLAGS =
BENCHFLAGS =

all: $(PROGRAMS)

$(BUILD)/xnbd-server: $(OBJS)
	$(CC) $(CFLAGS) -pthread $(LDFLAGS) -o $@ $(OBJS)

$(BUILD)/xnbd-bgctl: $(addprefix $(BUILD)/,$(BGCTL_OBJS))
	$(CC) $(CFLAGS) -pthread $(LDFLAGS) -o $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(BUILD)
	$(CC) $(CPPFLAGS) $(XCFLAGS) $(CFLAGS) -c -o $@ $<

-include $(OBJS:.o=.d) $(BUILD)/bgctl.d

check: $(PROGRAMS)
	XNBD_SERVER=$(abspath $(BUILD)/xnbd-server) tests/run $(CHECKFLAGS)

SANITIZE = -O1 -g -fno-omit-frame-pointer

asan:
	$(MAKE) BUILD=build/asan all \
		CFLAGS='$(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=undefined'
	XNBD_SANITIZED=1 $(MAKE) BUILD=build/asan -o build/asan/xnbd-server -o build/asan/xnbd-bgctl check

# A second signal ends the server at once, threads and all: no leak.
tsan:
	$(MAKE) BUILD=build/tsan all CFLAGS='$(SANITIZE) -fsanitize=thread'
	XNBD_SANITIZED=1 TSAN_OPTIONS=report_thread_leaks=0 \
		$(MAKE) BUILD=build/tsan -o build/tsan/xnbd-server -o build/tsan/xnbd-bgctl check

# Tables for unwinding are left out, since nothing unwinds, and so is the padding between segments.
STATIC_CC = musl-gcc
STATIC_CFLAGS = -Os -flto=auto -fno-pie -ffunction-sections -fdata-sections \
	-fno-asynchronous-unwind-tables -fno-unwind-tables
STATIC_LDFLAGS = -static -no-pie -s -Wl,--gc-sections -Wl,--build-id=none \
	-Wl,-z,noseparate-code -Wl,-z,norelro -Wl,-z,common-page-size=512

static:
	$(MAKE) BUILD=build/static CC=$(STATIC_CC) CFLAGS='$(STATIC_CFLAGS)' \
		LDFLAGS='$(STATIC_LDFLAGS)' all

tests/load: tests/load.c
	$(CC) $(CPPFLAGS) -std=c11 -Wall -Wextra -pthread -O2 -g $(LDFLAGS) -o $@ tests/load.c

bench: all tests/load
	$(PYTHON) tests/bench.py $(BENCHFLAGS)

install: all
	install -d $(DESTDIR)$(BINDIR) $(DESTDIR)$(SBINDIR) $(addprefix $(DESTDIR)$(MANDIR)/man,1 5 8)
	install -m 755 $(BUILD)/xnbd-bgctl $(DESTDIR)$(BINDIR)
	install -m 755 $(BUILD)/xnbd-server $(DESTDIR)$(SBINDIR)
	install -m 644 man/xnbd-bgctl.1 $(DESTDIR)$(MANDIR)/man1
	install -m 644 man/xnbd-bitmap.5 $(DESTDIR)$(MANDIR)/man5
	install -m 644 man/xnbd-server.8 $(DESTDIR)$(MANDIR)/man8

uninstall:
	rm -f $(DESTDIR)$(SBINDIR)/xnbd-server $(DESTDIR)$(BINDIR)/xnbd-bgctl \
		$(DESTDIR)$(MANDIR)/man1/xnbd-bgctl.1 $(DESTDIR)$(MANDIR)/man5/xnbd-bitmap.5 \
		$(DESTDIR)$(MANDIR)/man8/xnbd-server.8

clean:
	rm -rf xnbd-server xnbd-bgctl *.o *.d build tests/load tests/__pycache__ .pytest_cache

.PHONY: all check asan tsan static bench install uninstall clean
