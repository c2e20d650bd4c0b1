#!/usr/bin/env python3
"""What if the servers had the faults that others had?  Would the tests notice?

    tests/mutants.py [--only TEXT] [--list] [--jobs N] [--named]

A mutant is a small change that brings a hazard back (hazards.txt).  Each one is
made in a copy of the sources, built, and tested: by the tests that it names, and,
if those do not notice, by all, but those that need a virtual machine.  A mutant
that survives shows what nobody tests; then this exits with status 1.  --named
leaves it at the tests that are named.

The change must fit the sources exactly once, so that the list cannot rot; "make
check" sees to that (test_hazard_table.py).  --only takes a part of a name, a file
or a hazard.  It takes a few minutes for every ten mutants.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIRTUAL_MACHINES = ["test_kernel.py", "test_migration.py"]
PATIENCE = 3600                 # seconds for the tests of one mutant

# changes: [(file, old text, new text)]; tests: pytest's names, most likely first.
Mutant = namedtuple("Mutant", "name hazard changes tests")
MUTANTS = []
# Memory that is taken, and never given back.
TAKE = "volatile uint8_t *room = malloc({0});\n\nfor (size_t i = 0; i < {0}; i++)\n\troom[i] = 1;"


def mutant(name, hazard, *change, tests):
    """change: file, old, new, and so on."""
    changes = [change[i:i + 3] for i in range(0, len(change), 3)]
    MUTANTS.append(Mutant(name, hazard, changes, tests.split()))


# The handshake

mutant("the handshake has no deadline", "idle connections that never finish the handshake",
       "conn.c", "set_deadline(c, HANDSHAKE_MS);", "",
       tests="test_hazards.py::test_handshake_has_a_deadline_of_10_seconds")
mutant("each option gets the handshake's deadline anew",
       "idle connections that never finish the handshake",
       "conn.c", "if (next == PROTO_TRANSMIT)",
       "c->deadline = 0;\n\tset_deadline(c, HANDSHAKE_MS);\n\tif (next == PROTO_TRANSMIT)",
       tests="test_hazards.py::test_handshake_has_a_deadline_of_10_seconds")
mutant("connections have no cap", "idle connections that never finish the handshake: a cap",
       "access.c", "\tguests_max = places;", "\tguests_max = places + 4096;",
       "access.c", "calloc(places, ", "calloc(places + 4096, ",
       tests="test_hazards.py::test_connections_have_a_cap")
mutant("addresses are compared as bytes of text", "address rule matched as a text prefix",
       "access.c", "memcmp(network, r->address, sizeof(network)) == 0 &&",
       "is_prefix(r->address, address) &&",
       "access.c", "static bool is_allowed(",
       "static bool is_prefix(const uint8_t *a, const uint8_t *b)\n{\n"
       "\tchar one[INET6_ADDRSTRLEN], other[INET6_ADDRSTRLEN];\n\n"
       "\tinet_ntop(AF_INET6, a, one, sizeof(one));\n"
       "\tinet_ntop(AF_INET6, b, other, sizeof(other));\n"
       "\treturn strncmp(one, other, strlen(one)) == 0;\n}\n\nstatic bool is_allowed(",
       tests="test_access.py::test_address_does_not_admit_those_that_begin_like_it")
mutant("prefixes are of whole bytes", "address rule matched as a text prefix",
       "access.c", "memcmp(network, r->address, sizeof(network)) == 0 &&",
       "memcmp(network, r->address, r->bits / 8) == 0 &&",
       tests="test_access.py::test_prefix_is_exact_to_the_bit")
mutant("a dead connection keeps its descriptor", "handshake cut off",
       "conn.c", "close(c->source.fd);\n\tc->source.fd = -1;", "c->source.fd = -1;",
       tests="test_hazards.py::test_session_cut_off_at_every_byte")
mutant("each connection has buffers of its own", "idle connections: their memory",
       "conn.c", "c->greeting = greeting;",
       "c->greeting = greeting;\n" + TAKE.format("64 * 1024"),
       tests="test_hazards.py::test_2000_idle_connections_cost_little")
mutant("stopping tells no connection", "idle connections: stopping closes them",
       "clients.c", "conn_stop(conn_of(t->loop.source[i]));", "",
       "xnbd.c", "STOP_MS = 4500,", "STOP_MS = 45000,",
       tests="test_hazards.py::test_ends_in_time_whatever_clients_do")
mutant("a failed accept() is tried again at once", "accept() out of descriptors",
       "listen.c", "s->due = now_ms() + ACCEPT_PAUSE_MS;", "s->due = 0;",
       tests="test_hazards.py::test_running_out_of_descriptors_pauses_and_does_not_spin")
mutant("it starts with fewer descriptors than it needs", "few descriptors",
       "xnbd.c", "if (there <= needed)", "if (false)",
       tests="test_limits.py::test_any_number_of_descriptors_is_refused_or_enough")
mutant("clients may have all descriptors", "few descriptors: clients take them all",
       "xnbd.c", "there -= spare + LOOP_FDS * (*loops - 1);", "there += needed;",
       tests="test_limits.py::test_clients_leave_descriptors_to_the_server "
             "test_limits.py::test_clients_leave_descriptors_for_a_new_link")
mutant("poll() is tried again for ever", "poll() fails for ever",
       "loop.c", "if (err && err != EINTR && err != ENOMEM)", "if (false)",
       tests="test_limits.py::test_poll_that_fails_ends_the_server_with_a_line")
mutant("it starts without a thread", "no threads",
       "xnbd.c", "if (!err)\n\t\terr = worker_begin();", "worker_begin();",
       tests="test_limits.py::test_server_without_threads_does_not_start")
mutant("each thread that is missing is logged", "no threads: a line for each request",
       "worker.c", "pool.count > 0 && !pool.lacking", "pool.count > 0",
       tests="test_limits.py::test_threads_that_cannot_be_made_are_logged_once")
mutant("an oversize option is awaited", "option length 0xffffffff",
       "conn.c", "if (len > OPTION_DATA_MAX) {", "if (false) {",
       tests="test_hazards.py::test_oversize_option_is_refused_at_once")
mutant("memory is taken for announced option data", "option length: nothing allocated",
       "conn.c", "c->skip = len;", "c->skip = len;\n" + TAKE.format("len"),
       tests="test_hazards.py::test_announced_option_data_costs_no_memory")
mutant("a name may be longer than its option", "name length 0xffffffff or larger than its option",
       "proto.c", "if (n > in->left) {", "if (n > in->left + 4 && n < 4096) {",
       tests="test_hazards.py::test_name_larger_than_its_option")
mutant("names end at 256 bytes", "names of 0 to 4097 bytes",
       "proto.c", "if (name->len > PROTO_STRING_MAX)", "if (name->len > 256)",
       tests="test_hazards.py::test_information_about_names_of_many_sizes")
mutant("names may have one byte too many", "names of 0 to 4097 bytes",
       "proto.c", "if (name->len > PROTO_STRING_MAX)", "if (name->len > PROTO_STRING_MAX + 1)",
       tests="test_hazards.py::test_export_names_of_many_sizes")
mutant("names are compared as far as the client's goes", "names of 0 to 4097 bytes, in the table",
       "proto.c", "return name->len == strlen(s) && memcmp", "return memcmp",
       tests="test_exports.py::test_names_of_many_sizes")
mutant("every name means the first export", "a client reaches an export that it did not name",
       "proto.c", "if (x->any_name)", "if (true)",
       tests="test_exports.py::test_name_that_is_not_there_is_refused")
mutant("all exports have the size of the first",
       "a client reaches an export that it did not name: its range",
       "proto.c", "case NBD_INFO_EXPORT:\n\t\tout_export(o, e);",
       "case NBD_INFO_EXPORT:\n\t\tout_export(o, o->exports->entry[0]);",
       tests="test_exports.py::test_ranges_are_those_of_the_export")
mutant("EXPORT_NAME gets the first export",
       "a client reaches an export that it did not name: a thousand clients",
       "proto.c", "e = find_export(o, &name);\n\tif (!e)\n\t\treturn PROTO_CLOSE;",
       "e = find_export(o, &name);\n\tif (!e)\n\t\treturn PROTO_CLOSE;\n"
       "\te = o->exports->entry[0];",
       tests="test_exports.py::test_a_thousand_clients_of_several_exports")
mutant("the exports are not counted before the start", "more exports than LIST can tell",
       "exports.c", "if (!can_be_listed(o))", "if (false)",
       tests="test_exports.py::test_list_is_full_to_the_last_byte_or_refused")
mutant("a byte too many is counted", "more exports than LIST can tell: the last byte",
       "exports.c", "return bytes <= PROTO_LIST_ROOM ||", "return bytes < PROTO_LIST_ROOM ||",
       tests="test_exports.py::test_list_is_full_to_the_last_byte_or_refused")
mutant("images are told apart by their paths", "two exports write to one image",
       "disk.c", "return a->dev == b->dev && a->ino == b->ino;", "return a == b;",
       tests="test_exports.py::test_image_that_is_exported_twice_is_refused")
mutant("INFO ends the handshake", "INFO after INFO",
       "proto.c", "return o->opt == NBD_OPT_GO ?", "return o->opt ?",
       tests="test_hazards.py::test_info_after_info_for_other_names")
mutant("ABORT is not the end", "options after ABORT",
       "proto.c", "reply(o, NBD_REP_ACK);\n\treturn PROTO_CLOSE;",
       "reply(o, NBD_REP_ACK);\n\treturn PROTO_HAGGLE;",
       tests="test_hazards.py::test_options_after_abort_are_not_served")
mutant("an option needs no magic number", "transmission bytes among options",
       "proto.c", "return get_be64(p) == NBD_IHAVEOPT;", "return true;",
       tests="test_hazards.py::test_request_among_options_closes")
mutant("a request needs no magic number", "GO twice",
       "proto.c", "return \"wrong magic of a request\";", ";",
       tests="test_hazards.py::test_second_go_is_no_request")
mutant("an oldstyle client is awaited to greet", "oldstyle",
       "conn.c", "if (c->session.export)\n\t\tconn_enter_transmission(c);",
       "if (c->greeting == GREET_CONNECTED)\n\t\tconn_enter_transmission(c);",
       tests="test_hazards.py::test_oldstyle_session_cut_off_at_every_byte")
mutant("junk ends the server", "handshake followed by junk",
       "conn.c", 'conn_kill(c, "wrong magic of an option");', "abort();",
       tests="test_hazards.py::test_junk_at_every_byte")

# Requests

mutant("a range is checked by addition", "offset + length wraps",
       "proto.c", "if (r->len > size || r->off > size - r->len)", "if (r->off + r->len > size)",
       tests="test_hazards.py::test_ranges_that_wrap_change_nothing")
mutant("a length is rounded up in 32 bits", "lengths near 2^32",
       "proto.c", "if (r->len > size || r->off > size - r->len)",
       "uint32_t up = ((uint32_t)r->len + 511) & ~511u;\n\n\tif (up > size || r->off > size - up)",
       tests="test_hazards.py::test_ranges_that_wrap_change_nothing")
mutant("length 0 takes the rest of the disk", "length 0 at offset 0",
       "conn.c", "if (r->h.len == 0 && r->h.cmd != NBD_CMD_FLUSH) {\n\t\tconn_settle(c, r, commit_write(r));\n"
       "\t\treturn;\n\t}",
       "if (r->h.len == 0 && r->h.cmd != NBD_CMD_FLUSH)\n"
       "\t\tr->at.len = r->h.len = c->export->proto.size - r->h.off;",
       tests="test_hazards.py::test_length_0_touches_nothing")
mutant("length 0 marks the whole cache", "zero-length request marks the whole disk",
       "conn.c", "if (r->h.len == 0 && r->h.cmd != NBD_CMD_FLUSH) {\n\t\tconn_settle(c, r, commit_write(r));\n"
       "\t\treturn;\n\t}",
       "if (r->h.len == 0 && r->h.cmd != NBD_CMD_FLUSH)\n"
       "\t\tr->at.len = r->h.len = c->export->proto.size - r->h.off;",
       tests="test_proxy.py::test_requests_of_no_length_mark_nothing "
             "test_origin.py::test_requests_of_length_0_fetch_and_mark_nothing")
mutant("a refused payload is not drained", "refused WRITE whose payload is not drained",
       "conn.c", "if (h->payload && h->len > 0) {",
       "if (h->payload && h->len > 0 && !r->error) {",
       tests="test_hazards.py::test_refused_payload_that_arrives_slowly_is_drained")
mutant("a refused payload is stored", "refused WRITE whose payload is not drained",
       "conn.c", "if (!r->error) {\n\t\tstruct request *piece", "if (true) {\n\t\tstruct request *piece",
       tests="test_hazards.py::test_refused_payload_that_arrives_slowly_is_drained")
mutant("a payload may have 33 MiB", "of 33 MiB",
       "proto.c", "if (r->cmd == NBD_CMD_WRITE && r->len > PROTO_MAX_PAYLOAD)",
       "if (r->cmd == NBD_CMD_WRITE && r->len > 2 * PROTO_MAX_PAYLOAD)",
       tests="test_hazards.py::test_payloads_at_the_maximum")
mutant("a WRITE may have 33 MiB", "of 33 MiB",
       "proto.c", "if (r->cmd == NBD_CMD_WRITE && r->len > PROTO_MAX_PAYLOAD)",
       "if (r->cmd == NBD_CMD_WRITE && r->len > 2 * PROTO_MAX_PAYLOAD)",
       tests="test_hazards.py::test_payloads_at_the_maximum")
mutant("a payload may not have 32 MiB", "payload of 32 MiB",
       "proto.c", "if (r->cmd == NBD_CMD_WRITE && r->len > PROTO_MAX_PAYLOAD)",
       "if (r->cmd == NBD_CMD_WRITE && r->len >= PROTO_MAX_PAYLOAD)",
       tests="test_hazards.py::test_payloads_at_the_maximum")
mutant("flags are not looked at", "flags on every command",
       "proto.c", "return r->flags & ~allowed ? EINVAL : 0;", "return 0;",
       tests="test_hazards.py::test_random_requests_get_one_reply_each "
             "test_protocol.py::test_flags_of_each_command")
mutant("unknown commands are done", "command types 0 to 65535",
       "proto.c", "if (r->cmd >= ARRAY_SIZE(own) || r->cmd == NBD_CMD_DISC)\n\t\treturn EINVAL;",
       "if (r->cmd >= ARRAY_SIZE(own) || r->cmd == NBD_CMD_DISC)\n\t\treturn 0;",
       tests="test_hazards.py::test_every_command_type_is_answered")
mutant("an early READ error is a simple reply", "early READ error sent as a simple reply",
       "proto.c", "if (!s->structured ||\n", "if (err == EINVAL || !s->structured ||\n",
       tests="test_hazards.py::test_early_read_errors_are_chunks")
mutant("a request always has 28 bytes", "request with a header of the wrong size",
       "conn.c", "take_request(c, &h, error != 0, ret);\n\treturn size;",
       "take_request(c, &h, error != 0, ret);\n\treturn PROTO_REQUEST_SIZE;",
       tests="test_extended.py::test_requests_of_all_kinds_follow_each_other")
mutant("only a WRITE has a payload", "unexpected payload that is not drained",
       "proto.c", "(s->extended && r->flags & NBD_CMD_FLAG_PAYLOAD_LEN);", "false;",
       tests="test_extended.py::test_unexpected_payload_is_consumed")
mutant("a WRITE has a payload by its flag only", "qemu writes without PAYLOAD_LEN",
       "proto.c", "r->payload = r->cmd == NBD_CMD_WRITE ||",
       "r->payload = (!s->extended && r->cmd == NBD_CMD_WRITE) ||",
       tests="test_extended.py::test_write_without_the_flag_has_a_payload_all_the_same")
mutant("any payload is awaited", "payload of 2^64 - 1 bytes",
       "proto.c", "if (s->extended && r->payload && r->len > PROTO_MAX_PAYLOAD)", "if (false)",
       tests="test_extended.py::test_payload_above_the_maximum_closes")
mutant("a long range is checked by addition", "length of 64 bits wraps",
       "proto.c", "if (r->len > size || r->off > size - r->len)",
       "if (r->len >> 32 ? r->off + r->len > size : r->len > size || r->off > size - r->len)",
       tests="test_extended.py::test_hostile_lengths_change_nothing")
mutant("a length is taken in 32 bits", "length of 64 bits is cut down to 32",
       "proto.c", "r->len = s->extended ? get_be64(p + 24) :",
       "r->len = s->extended ? (uint32_t)get_be64(p + 24) :",
       tests="test_extended.py::test_zeroing_of_more_than_4_gib_clears_all_of_its_range")
mutant("an extent is told in 32 bits", "extents are cut down to 32 bits",
       "proto.c", "put_be64(put_be64(p, extent->len), extent->flags)",
       "put_be64(put_be64(p, (uint32_t)extent->len), extent->flags)",
       tests="test_extended.py::test_extent_of_more_than_4_gib_is_told_as_one")
mutant("more is sent at once than the system takes", "READ longer than IOV_MAX pieces",
       "conn.c", "TX_IOVS = 1024,", "TX_IOVS = 4096,",
       tests="test_hazards.py::test_burst_of_large_reads")
mutant("zeroing ends after 16 MiB",
       "WRITE_ZEROES or TRIM of more than 64 MiB clears only the first part",
       "layer.c", "ret = zero_whole(l, whole, off + head, flags);",
       "ret = zero_whole(l, whole < 16 << 20 ? whole : 16 << 20, off + head, flags);",
       tests="test_hazards.py::test_long_zeroing_clears_all_of_its_range")
mutant("TRIM ends after 16 MiB",
       "WRITE_ZEROES or TRIM of more than 64 MiB clears only the first part",
       "layer.c", "ret = zero_whole(l, whole, off + head, flags);",
       "ret = zero_whole(l, flags & NBD_CMD_FLAG_FAST_ZERO && whole > 16 << 20 ? 16 << 20 : whole,\n"
       "\t\t\t\t off + head, flags);",
       tests="test_hazards.py::test_long_zeroing_clears_all_of_its_range")
mutant("TRIM of a part clears its whole first block",
       "TRIM or WRITE_ZEROES of a partial block clears the wrong end",
       "backend.c", "uint64_t from = (r->h.off + BLOCK_SIZE - 1) / BLOCK_SIZE * BLOCK_SIZE;",
       "uint64_t from = r->h.off / BLOCK_SIZE * BLOCK_SIZE;",
       tests="test_protocol.py::test_trim_discards_whole_blocks_and_keeps_the_rest")
mutant("FLUSH answers at once", "FLUSH as the first command",
       "layer.c", "if (b->readonly && !l->durable)", "if (true)",
       tests="test_protocol.py::test_flush_makes_writes_stable")
mutant("FLUSH is never answered", "FLUSH as the first command",
       "layer.c", "worker_submit(&r->job, &l->commits);", "",
       tests="test_hazards.py::test_flush_as_the_first_command")
mutant("all exports share their workers", "a disk that hangs holds up another export",
       "conn.c", "r->job.lane = &c->export->lane;", "",
       tests="test_exports.py::test_disk_that_hangs_holds_up_its_own_export_only")
mutant("a snapshot waits for those of the exports before",
       "a disk that hangs holds up another export: its snapshot",
       "exports.c", "tend_snapshot(&exports.all[i], ended);",
       "{\n\t\ttend_snapshot(&exports.all[i], ended);\n\t\tif (exports.all[i].snapshot)\n\t\t\tbreak;\n\t}",
       tests="test_exports.py::"
             "test_snapshot_of_another_export_does_not_wait_for_a_disk_that_hangs")
mutant("a stuck worker is awaited without end",
       "SIGTERM with a disk that hangs, and another export",
       "xnbd.c", "STOP_MS = 4500,", "STOP_MS = 45000,",
       tests="test_exports.py::test_server_ends_in_time_though_a_disk_hangs")
mutant("FLUSH is done by the thread of its connection", "a disk that hangs",
       "layer.c", "if (b->readonly && !l->durable)\n\t\treturn 0;",
       "if (true)\n\t\treturn disk_sync(l->disk);",
       tests="test_faults.py::test_sync_that_hangs_holds_up_only_who_waits_for_it")
mutant("FUA does not flush", "flags on every command",
       "backend.c", "if (ret == 0)\n\t\treturn request_commit(r);\n\treturn r->absent",
       "if (ret == 0)\n\t\treturn 0;\n\treturn r->absent",
       tests="test_protocol.py::test_fua_write_is_stable")
mutant("reads share a file offset", "two connections read at once through a shared file offset",
       "disk.c",
       "n = syscall(SYS_preadv2, d->fd, &iov, 1, (long)off, (long)(off >> 32), NOWAIT);",
       "lseek(d->fd, (off_t)off, SEEK_SET);\n\tn = NOWAIT ? readv(d->fd, &iov, 1) : -1;",
       "util.c", "pread(fd, buf, len, (off_t)off);",
       "lseek(fd, (off_t)off, SEEK_SET) < 0 ? -1 : read(fd, buf, len);",
       tests="test_hazards.py::test_reads_do_not_move_the_file_offset "
             "test_hazards.py::test_connections_that_read_at_once_get_their_own_bytes")
mutant("large reads begin a byte late", "READ of exactly a buffer's size",
       "disk.c",
       "return how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       "off += len % 4096 == 1;\n"
       "\treturn how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       tests="test_hazards.py::test_reads_around_the_sizes_of_buffers")
mutant("the last byte of a large payload is lost", "READ of exactly a buffer's size",
       "conn.c", "*piece = new_piece(c, r, n);", "*piece = new_piece(c, r, n == r->at.len ? n - 1 : n);",
       tests="test_hazards.py::test_writes_around_the_sizes_of_buffers")

# Clients that misbehave

mutant("replies are gathered without bound", "client that does not read its replies",
       "conn.c", "BUFFERED_MAX = 2 * 1024 * 1024,", "BUFFERED_MAX = 0x7fffffff,",
       tests="test_hazards.py::test_unread_replies_cost_bounded_memory")
mutant("a deaf client stops its thread", "ten of them, others unaffected",
       "conn.c", "MSG_DONTWAIT | MSG_NOSIGNAL", "MSG_NOSIGNAL",
       "listen.c", "&len, SOCK_CLOEXEC | SOCK_NONBLOCK", "&len, SOCK_CLOEXEC",
       tests="test_hazards.py::test_ten_deaf_clients_do_not_disturb_others")
mutant("what is sent in part is sent again", "it may begin to",
       "conn.c", "tx->iov[tx->first].iov_base = (uint8_t *)tx->iov[tx->first].iov_base + n;", "",
       tests="test_hazards.py::test_replies_are_complete_when_they_are_read_late")
mutant("pages that were read stay resident", "large reads leave the image resident",
       "disk.c",
       "return how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       "uint64_t from = round_down(off);\n"
       "\tuint8_t *map = mmap(NULL, off + len - from, PROT_READ, MAP_SHARED, d->fd,\n"
       "\t\t\t    (off_t)from);\n\n"
       "\tfor (uint64_t i = 0; map != MAP_FAILED && i < len; i += 4096)\n"
       "\t\t(void)*(volatile uint8_t *)(map + off - from + i);\n"
       "\treturn how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       "disk.c", "#include <sys/stat.h>", "#include <sys/stat.h>\n#include <sys/mman.h>",
       "disk.c", "/* Reading */",
       "static uint64_t round_down(uint64_t off);\n\n/* Reading */",
       tests="test_hazards.py::test_pass_over_the_image_does_not_stay_resident")
mutant("half a request is thrown away", "one byte at a time",
       "conn.c", "keep(c, p + taken, len - taken)",
       "keep(c, p + taken, c->state == CONN_REQUEST && !c->current ? 0 : len - taken)",
       tests="test_hazards.py::test_session_one_byte_at_a_time")
mutant("a connection is freed while its requests are in flight", "closes with 64 reads in flight",
       "conn.c", "return c->state == CONN_DEAD && c->in_flight == 0;",
       "return c->state == CONN_DEAD;",
       "conn.c", "assert(conn_is_over(c) && c->buffered == 0);", "",
       tests="test_origin.py::test_clients_that_leave_while_they_wait_leave_nothing "
             "test_origin.py::test_client_may_leave_while_it_waits")
mutant("the memory of a dead client's request stays", "closes with 64 reads in flight",
       "conn.c", "\ttake_home(c, r);\n\tc->buffered -= r->counted;",
       "\tif (c->state == CONN_DEAD) {\n" + TAKE.format("1 << 20") + "\n\t}\n\ttake_home(c, r);\n"
       "\tc->buffered -= r->counted;",
       tests="test_order.py::test_clients_that_gave_up_give_back_all_at_once")
mutant("a WRITE clears its range before its payload comes", "client dies within a payload",
       "conn.c", "c->current = r;\n",
       "if (!r->error)\n\t\t\tr->backend->ops->zero(r->backend, r->h.len, r->h.off, 0);\n"
       "\t\tc->current = r;\n",
       tests="test_hazards.py::test_death_within_a_payload_touches_nothing_else")
mutant("a buffer is lent twice", "one client's data reach another",
       "buffer.c", "if (k) {\n\t\t*p = k->next;", "if (k) {\n\t\t;",
       tests="test_origin.py::test_memory_that_is_used_again_is_lent_to_one_at_a_time")
mutant("stopping waits for a deaf client", "SIGTERM with a client that does not read",
       "conn.c", "set_deadline(c, STOPPING_MS);", "",
       "xnbd.c", "STOP_MS = 4500,", "STOP_MS = 45000,",
       tests="test_hazards.py::test_ends_in_time_whatever_clients_do")
mutant("a signal ends the service", "signal storm during load",
       "loop.c", "if (err && err != EINTR && err != ENOMEM)", "if (err && err != ENOMEM)",
       tests="test_hazards.py::test_signal_storm_during_load")
mutant("the main thread opens the log file again", "signal storm during load",
       "log.c", "queue.reopen = log_to == LOG_TO_FILE;", "reopen_log();",
       tests="test_hazards.py::test_nobody_waits_while_the_log_file_is_opened_again")
mutant("a deadline that is over is not noticed", "SIGTERM with a client that does not read",
       "conn.c", "if (!revents && c->deadline && c->deadline <= now_ms())", "if (false)",
       "xnbd.c", "STOP_MS = 4500,", "STOP_MS = 45000,",
       tests="test_hazards.py::test_ends_in_time_whatever_clients_do")

# Files

mutant("--create follows a symlink", "followed symlinks",
       "disk.c", "if (lstat(path, &st) == 0)", "if (stat(path, &st) == 0)",
       "disk.c", "err = create_file(path, false, set_size, &size);",
       "err = set_size(&size, open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));",
       tests="test_hazards.py::test_created_image_follows_no_symlink")
mutant("--create makes an image for all", "files of mode other than 0600",
       "disk.c", "err = create_file(path, false, set_size, &size);",
       "err = set_size(&size, open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));",
       tests="test_hazards.py::test_created_image_is_private")
mutant("a log under /tmp that nobody asked for", "fixed names under /tmp",
       "xnbd.c", 'log_name("xnbd-server");',
       'log_name("xnbd-server");\n\topen("xnbd-server.log", O_WRONLY | O_CREAT, 0600);',
       tests="test_hazards.py::test_creates_no_files_of_its_own")
mutant("the image is mapped and read by our own code", "image truncated under a running server",
       "disk.c",
       "return how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       "uint8_t *map = mmap(NULL, off + len, PROT_READ, MAP_SHARED, d->fd, 0);\n\n"
       "\t(void)how, (void)read_try;\n"
       "\tif (map == MAP_FAILED)\n\t\treturn -EIO;\n"
       "\tmemcpy(buf, map + off, len);\n\tmunmap(map, off + len);\n\treturn 0;",
       "disk.c", "#include <sys/stat.h>", "#include <sys/stat.h>\n#include <sys/mman.h>",
       tests="test_hazards.py::test_truncated_image_costs_one_connection_at_most "
             "test_hazards.py::test_image_truncated_while_reads_are_in_flight")
mutant("what is read is looked at in the image before", "image truncated while it is read",
       "disk.c",
       "return how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       "volatile uint8_t *map = mmap(NULL, off + len, PROT_READ, MAP_SHARED, d->fd, 0);\n\n"
       "\tif (map != MAP_FAILED) {\n\t\t(void)map[off + len - 1];\n"
       "\t\tmunmap((void *)map, off + len);\n\t}\n"
       "\treturn how == TRY ? read_try(d, buf, len, off) : read_at(d->fd, buf, len, off);",
       "disk.c", "#include <sys/stat.h>", "#include <sys/stat.h>\n#include <sys/mman.h>",
       tests="test_hazards.py::test_image_truncated_while_reads_are_in_flight "
             "test_hazards.py::test_truncated_image_costs_one_connection_at_most")
mutant("behind the end of a truncated image there are zeros",
       "image truncated under a running server",
       "util.c", "pread(fd, buf, len, (off_t)off);\n",
       "pread(fd, buf, len, (off_t)off);\n\n\t\tif (n == 0 && !out) {\n"
       "\t\t\tmemset(buf, 0, len);\n\t\t\treturn 0;\n\t\t}\n",
       tests="test_hazards.py::test_truncated_image_costs_one_connection_at_most "
             "test_protocol.py::test_read_that_fails_does_not_begin_with_success")
mutant("a file size limit kills", "a file size limit kills the server",
       "xnbd.c", "signal(SIGXFSZ, SIG_IGN);", "",
       tests="test_hazards.py::test_write_that_the_system_refuses_is_enospc")
mutant("a short write is a success", "an I/O error under a running server",
       "util.c", "pread(fd, buf, len, (off_t)off);\n",
       "pread(fd, buf, len, (off_t)off);\n\n\t\tif (n > 0 && out)\n\t\t\treturn 0;\n",
       tests="test_hazards.py::test_write_that_the_system_refuses_is_enospc "
             "test_cow.py::test_full_overlay_disk_is_enospc_for_that_write")
mutant("a line that cannot be logged is tried again", "a full disk under the log file",
       "log.c", "} else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {", "} else if (n == 0) {",
       tests="test_faults.py::test_log_that_cannot_be_written_costs_nothing")
mutant("who logs waits for the reader", "whoever should read the log does not",
       "log.c", "\t} else if (!queue.started) {\n\t\tqueue.lost += !write_line(log_to, line, len, FLUSH_MS);",
       "\t} else if (true) {\n\t\tqueue.lost += !write_line(log_to, line, len, -1);",
       tests="test_service.py::test_log_that_nobody_reads_costs_lines_only")
mutant("lost lines are not counted", "whoever should read the log does not",
       "log.c", "\t\tqueue.lost++;\n", "\t\t;\n",
       tests="test_service.py::test_log_that_nobody_reads_costs_lines_only")
mutant("a FIFO is opened when there is a reader", "whoever should read the log does not",
       "log.c", "open(path, O_RDWR | flags, 0640)",
       "open(path, O_WRONLY | (flags & ~O_NONBLOCK), 0640)",
       tests="test_service.py::test_fifo_is_a_log_without_a_reader")
mutant("any file is a log", "an image is named as the log file",
       "log.c", "if (!log_is_text(fd)) {", "if (false && !log_is_text(fd)) {",
       tests="test_service.py::test_file_that_is_no_text_is_no_log")
mutant("nothing is confined", "a server that was taken over reaches other files",
       "confine.c", "if (sandbox)", "if (sandbox && false)",
       tests="test_confine.py::test_target_reaches_its_directory_only")
mutant("the directory of a device is kept", "a server that was taken over reaches other files",
       "xnbd.c", "if (e->disk && e->disk->is_file)", "if (e->disk)",
       tests="test_confine.py::test_device_does_not_open_the_directory_of_devices")
mutant("programs may be executed", "a server that was taken over reaches other files",
       "confine.c", "set.files = rules.rights;", "set.files = rules.rights &= ~1u;",
       tests="test_confine.py::test_target_reaches_its_directory_only")
mutant("a target may connect", "a server that was taken over reaches other files",
       "confine.c", "connects ? 0 : NET_CONNECT", "0 & connects",
       tests="test_confine.py::test_target_reaches_its_directory_only")
mutant("a worker is there before", "rights that one thread keeps",
       "worker.c", "pool.idle == 0 && pool.count > 0 && ", "pool.idle == 0 && ",
       tests="test_confine.py::test_files_of_a_killed_server_do_not_start_a_thread_too_early")
mutant("the origin's thread is there before", "rights that one thread keeps",
       "xnbd.c", "!give_up_rights() || !log_start() ||\n\t    !start_threads() || !exports_start())",
       "!log_start() || !start_threads() || !exports_start() || !give_up_rights())",
       tests="test_confine.py::test_proxy_can_look_up_names_and_connect "
             "test_confine.py::test_all_threads_of_a_proxy_are_the_user")
mutant("only the effective user changes", "root comes back",
       "confine.c", "setuid(user.uid) < 0", "seteuid(user.uid) < 0",
       "confine.c", "setuid(0) == 0 || getuid() != user.uid || ", "",
       tests="test_confine.py::test_server_becomes_the_user_for_ever")
mutant("the groups of root stay", "root comes back",
       "confine.c", "setgroups(1, &user.gid) < 0 || ", "",
       tests="test_confine.py::test_server_becomes_the_user_for_ever")
mutant("what --user may do is not looked at", "what --user may not do shows when it is too late",
       "confine.c", "access(place, W_OK | X_OK) < 0", "false",
       tests="test_confine.py::test_what_the_user_may_not_do_is_told")
mutant("what root may do is looked at", "what --user may not do shows when it is too late",
       "confine.c", "\tif (user.name && !become_user())\n\t\treturn false;\n", "",
       "confine.c", "\tif (rules.fd >= 0) {", "\tif (user.name && !become_user())\n\t\treturn false;\n\tif (rules.fd >= 0) {",
       tests="test_confine.py::test_what_the_user_may_not_do_is_told")
mutant("each connection is logged", "a client floods the log",
       "log.c", "if (*used < now + PEER_BURST * PEER_MS) {", "if (true) {",
       tests="test_service.py::test_flood_of_clients_is_counted_not_told")
mutant("each error of a client is logged", "a client floods the log",
       "stats.c", "if (now < s->say_again) {", "if (false) {",
       tests="test_stats.py::test_errors_do_not_flood_the_log")
mutant("statistics of nobody are told", "a timer that ticks for nobody",
       "xnbd.c", "clients_count() > 0 ? stats : 0", "stats",
       tests="test_stats.py::test_no_timer_ticks_for_nobody")
mutant("a stale socket stops the next start", "a stale Unix socket stops the next start",
       "listen.c", "if (unlink(sun->sun_path) < 0)\n\t\t\treturn strerror(errno);", "return \"it is in use\";",
       tests="test_service.py::test_stale_unix_socket_is_replaced")
mutant("a live socket is stolen", "a live Unix socket is stolen",
       "listen.c", "if (is_alive(sun))\n\t\t\treturn \"another server is listening there\";", "",
       tests="test_service.py::test_live_unix_socket_is_refused")
mutant("a file that is no socket is replaced", "a live Unix socket is stolen",
       "listen.c", "if (!S_ISSOCK(st.st_mode))\n\t\t\treturn \"there is a file that is not a socket\";", "",
       tests="test_service.py::test_what_is_no_socket_is_not_replaced")
mutant("a socket that does not listen yet is stale", "two starts at once",
       "listen.c", "flock(fd, LOCK_EX | LOCK_NB) < 0", "false",
       tests="test_service.py::test_socket_of_a_server_that_starts_is_not_stolen")
mutant("a pidfile is not locked", "two servers with one pidfile",
       "xnbd.c", "flock(fd, LOCK_EX | LOCK_NB) < 0 || ", "",
       tests="test_service.py::test_pidfile_of_a_running_server_is_refused")
mutant("whatever is there is overwritten", "a pidfile that is none",
       "xnbd.c", "if (st.st_size > 0 && !holds_number(fd))", "if (false)",
       tests="test_service.py::test_what_is_no_pidfile_is_left_alone")
mutant("standard descriptors stay closed", "the log in the image",
       "xnbd.c", "occupy_standard_descriptors();\n\tlog_keep_off(", "log_keep_off(",
       tests="test_service.py::test_closed_standard_descriptors_without_devices "
             "test_service.py::test_closed_standard_descriptors_harm_nothing")
mutant("an answer goes into the socket", "the log in the image: an answer in a socket",
       "bgctl.c", "occupy_standard_descriptors();", "",
       tests="test_control.py::test_output_that_cannot_be_written_is_an_error")
mutant("a misspelt option is ignored", "a misspelt option is ignored",
       "options.c", "bad_option(found);", "continue;",
       tests="test_service.py::test_wrong_usage_is_named")
mutant("an option of another mode is ignored", "a misspelt option is ignored",
       "options.c", "if (line.given[i] && !(p->rows[i].modes & line.chosen->modes))", "if (false)",
       tests="test_cow.py::test_cow_options_belong_to_cow_target")

# Snapshots

mutant("nobody copies before a write", "a snapshot is not of one instant",
       "disk.c", "return d->hook ? d->hook->before_change(d->hook, len, off, how) : 0;",
       "(void)d, (void)len, (void)off, (void)how;\n\treturn 0;",
       tests="test_snapshot.py::test_ten_snapshots_under_load_are_each_one_instant")
mutant("nobody copies before a TRIM", "a snapshot is not of one instant",
       "disk.c", "int ret = before_change(d, len, off, WAIT);\n\n\tif (ret)",
       "int ret = fast ? 0 : before_change(d, len, off, WAIT);\n\n\tif (ret)",
       tests="test_snapshot.py::test_disk_cleared_as_a_whole_during_a_snapshot_is_in_it "
             "test_snapshot.py::test_zeroes_and_trims_during_a_snapshot_are_not_in_it")
mutant("who comes before its instant does not wait for that", "a snapshot is not of one instant",
       "order.c", ".active = { off, len } };", ".active = { off, 0 } };",
       "order.c", "\tif (!alone)\n", "\tc->active.len = len;\n\tif (!alone)\n",
       tests="test_hazards.py::test_write_under_way_is_in_the_snapshot_and_a_later_one_is_not")
mutant("a block is copied a second time", "a snapshot is not of one instant",
       "snapshot.c", "if (!copied)\n\t\t\terr =", "if (true)\n\t\t\terr =",
       tests="test_hazards.py::test_block_is_copied_into_a_snapshot_once")
mutant("a snapshot's bits are ahead of its data", "a snapshot is not of one instant",
       "snapshot.c", "\tcopy_blocks(s, blk, end, buf);\n\torder_remove",
       "\tbitmap_set(s->copied, blk, end - blk, true);\n"
       "\tcopy_range(s, blk * BLOCK_SIZE, end * BLOCK_SIZE, buf);\n\torder_remove",
       "snapshot.c", "order_hold(&s->disk->order, &hold, (end - blk) * BLOCK_SIZE, blk * BLOCK_SIZE, true);",
       "memset(&hold, 0, sizeof(hold));",
       tests="test_snapshot.py::test_ten_snapshots_under_load_are_each_one_instant "
             "test_snapshot.py::test_zeroes_and_trims_during_a_snapshot_are_not_in_it")
mutant("a snapshot has its name before it is durable", "a snapshot appears before it is complete",
       "snapshot.c", "if (!err && fsync(s->fd) < 0)", "if (false)",
       tests="test_hazards.py::test_snapshot_has_no_name_before_it_is_durable")

mutant("a snapshot's error is the client's", "a snapshot that failed is noticed by clients",
       "snapshot.c", "free(buf);\n\treturn 0;", "free(buf);\n\treturn atomic_load(&s->error);",
       tests="test_snapshot.py::test_full_disk_fails_the_snapshot_and_nobody_else")

mutant("a block that could not be copied counts as copied", "under a snapshot",
       "snapshot.c", "if (err)\n\t\tatomic_store(&s->error, err);\n\telse\n\t\tbitmap_set(s->copied,",
       "if (true)\n\t\tbitmap_set(s->copied,",
       tests=
       "test_faults.py::test_old_block_that_cannot_be_kept_fails_the_snapshot_and_not_the_write")

# Copy on write

mutant("FLUSH marks every block", "FLUSH marks every block as written",
       "layer.c", "r->commits = atomic_load(&l->begun);",
       "bitmap_set(l->map, 0, bitmap_blocks(b->size), true);\n"
       "\tr->commits = atomic_load(&l->begun);",
       tests="test_cow.py::test_flush_changes_nothing")
mutant("a block is marked before it is stored", "client dies after 4 of 64 KiB",
       "layer.c", "ret = disk_write(l->disk, buf, n, off, how);\n"
       "\t\t\tret = set_held(l, n, off, ret, how);",
       "ret = set_held(l, n, off, 0, how);\n\t\t\tif (ret == 0)\n"
       "\t\t\t\tret = disk_write(l->disk, buf, n, off, how);",
       tests="test_cow.py::test_reader_beside_a_first_write_finds_old_or_new "
             "test_cow.py::test_full_overlay_disk_is_enospc_for_that_write")
mutant("all of a payload's blocks are marked at its first piece", "client dies after 4 of 64 KiB",
       "layer.c", "return ret ? ret : write_range(layer_of(b), buf, len, off, how);",
       "if (off % BLOCK_SIZE == 0 && b->size - off >= 16 * BLOCK_SIZE)\n"
       "\t\tbitmap_set(layer_of(b)->map, off / BLOCK_SIZE, 16, true);\n"
       "\treturn ret ? ret : write_range(layer_of(b), buf, len, off, how);",
       tests="test_cow.py::test_client_that_dies_in_a_payload_leaves_each_block_old_or_new")
mutant("pieces of a payload end anywhere", "client dies after 4 of 64 KiB",
       "conn.c", "return n > tail ? n - tail : 0;", "(void)tail;\n\treturn n;",
       tests="test_cow.py::test_client_that_dies_in_a_payload_leaves_each_block_old_or_new")
mutant("the halves of a block are merged at the same time",
       "two clients write the two halves of one fresh block",
       "order.c", "a / BLOCK_SIZE <= (b + b_len - 1) / BLOCK_SIZE &&\n"
       "\t       b / BLOCK_SIZE <= (a + a_len - 1) / BLOCK_SIZE;",
       "a <= b + b_len - 1 &&\n\t       b <= a + a_len - 1;",
       tests="test_cow.py::test_clients_at_the_same_moment_all_win")
mutant("a range within another does not overlap it",
       "an aligned write during another's partial write",
       "order.c", "a / BLOCK_SIZE <= (b + b_len - 1) / BLOCK_SIZE &&\n"
       "\t       b / BLOCK_SIZE <= (a + a_len - 1) / BLOCK_SIZE;",
       "a / BLOCK_SIZE == b / BLOCK_SIZE;",
       tests="test_hazards.py::test_aligned_write_during_another_one_stays "
             "test_cow.py::test_clients_at_the_same_moment_all_win")
mutant("a loop does not look at those that others store",
       "an aligned write during another's partial write",
       "order.c", "if (!must_wait(c, s.len, s.off)) {", "if (!wait || !must_wait(c, s.len, s.off)) {",
       tests="test_cow.py::test_clients_at_the_same_moment_all_win")
mutant("READs are searched for holes again and again",
       "the search for a hole passes all extents of the rest of the disk",
       "backend.c", "if (took > SLOW_LOOK_US)", "if (took > SLOW_LOOK_US && false)",
       tests="test_hazards.py::test_reads_are_not_searched_for_holes_where_that_takes_long")
mutant("what waits counts as if it held memory", "requests that wait shut out those that need not",
       "conn.c", "return own > 0 && (own >= own_max || room == 0 || own / 2 > room);",
       "return own > 0 ? own >= own_max || room == 0 || own / 2 > room : now / 8 >= max;",
       "conn.c", "\tc->buffered += r->counted;",
       "\tc->buffered += r->counted;\n\tatomic_fetch_add(&load.bytes, r->counted);",
       "conn.c", "\tc->buffered -= r->counted;",
       "\tc->buffered -= r->counted;\n\tatomic_fetch_sub(&load.bytes, r->counted);",
       tests="test_control.py::test_reads_that_wait_for_the_origin_shut_nobody_out "
             "test_control.py::test_clients_that_take_no_replies_shut_nobody_out")
mutant("clients that have nothing are shut out", "requests that wait shut out those that need not",
       "conn.c", "return own > 0 && (own >= own_max || room == 0 || own / 2 > room);",
       "return own > 0 ? own >= own_max || room == 0 || own / 2 > room : now / 8 >= max;",
       tests="test_control.py::test_writes_that_wait_for_the_origin_shut_nobody_out "
             "test_control.py::test_clients_that_take_no_replies_shut_nobody_out_of_a_full_disk")
mutant("a stream has its next piece while nothing is taken", "requests that wait shut out those that need not",
       "conn.c", "if (has_data_enough(c) && !conn_flush(c))", "if (false)",
       tests="test_control.py::test_clients_that_take_no_replies_shut_nobody_out_of_a_full_disk")
mutant("a thread looks whether to stop before it hears what it is woken for",
       "a stop that comes while a client leaves is missed",
       "clients.c", "\t\ttake_mail(t);\n\t\tif (clients.stopped && clients.total == 0)",
       "\t\tbool over = clients.stopped && clients.total == 0;\n\n\t\tusleep(5000);\n"
       "\t\ttake_mail(t);\n\t\tif (over)",
       "clients.c", "#include <errno.h>", "#include <errno.h>\n#include <unistd.h>",
       tests="test_service.py::test_stop_while_a_client_leaves_ends_at_once")
mutant("zeros that find room end a full disk", "a client floods the log",
       "fetch.c", "now_ms() - failed >= STORED_MS &&", "true &&",
       tests="test_control.py::test_failure_to_cache_is_told_once_though_zeros_find_room")
mutant("a start looks at its images itself", "a start waits for a disk that is slow",
       "exports.c", "worker_submit(&e->look, &e->export.lane);", "look_at_image(&e->look);",
       tests="test_hazards.py::test_start_does_not_wait_for_a_slow_disk")
mutant("a block that is held is merged again", "an aligned write during another's partial write",
       "layer.c", "if (held) {\n\t\t\tret = disk_write(", "if (held && (n % BLOCK_SIZE == 0 || !l->base)) {\n"
       "\t\t\tret = disk_write(",
       tests="test_cow.py::test_clients_at_the_same_moment_all_win")
mutant("marking is not atomic", "a neighbour's bit vanishes",
       "bitmap.c", "unsigned fresh = bits & ~(unsigned)atomic_fetch_or_explicit(&b->live[at], bits,\n"
       "\t\t\t\t\t\t\t\t     memory_order_acq_rel);",
       "unsigned old = atomic_load(&b->live[at]), fresh = bits & ~old;\n\n\tsched_yield();\n"
       "\tatomic_store(&b->live[at], (unsigned char)(old | bits));",
       "bitmap.c", "#include <fcntl.h>", "#include <fcntl.h>\n#include <sched.h>",
       tests="test_cow.py::test_neighbours_marked_at_the_same_moment_all_stay "
             "test_cow.py::test_clients_at_the_same_moment_all_win")
mutant("TRIM and WRITE_ZEROES take a part for a whole block",
       "TRIM or WRITE_ZEROES of a partial block clears the wrong end",
       "layer.c", "return off + len == l->size ? len : len - len % BLOCK_SIZE;",
       "(void)l;\n\treturn len;",
       tests="test_cow.py::test_zeroing_clears_exactly_its_range "
             "test_cow.py::test_trim_clears_the_whole_blocks_of_its_range")
mutant("WRITE_ZEROES clears the wrong end",
       "TRIM or WRITE_ZEROES of a partial block clears the wrong end",
       "layer.c", "ret = write_range(l, zeros, tail, off + head + whole, WAIT);",
       "ret = write_range(l, zeros, tail, off + head, WAIT);",
       tests="test_cow.py::test_zeroing_clears_exactly_its_range")
mutant("the overlay has a name", "overlay left behind after kill -9",
       "disk.c", "#if defined(O_TMPFILE) && !defined(XNBD_PORTABLE)", "#if 0",
       "disk.c", "else if (fd >= 0)\n\t\tunlink(path);", "",
       tests="test_cow.py::test_overlay_has_no_name_from_the_beginning")
mutant("blocks are counted modulo 4 GiB", "overlay larger than 4 GiB wraps",
       "layer.c", "uint64_t blk = off / BLOCK_SIZE, end = off + len, blocks, to;",
       "uint64_t blk = (uint32_t)off / BLOCK_SIZE, end = off + len, blocks, to;",
       "layer.c", "blocks = bitmap_run(l->map, blk, bitmap_blocks(end) - blk, held);",
       "blocks = bitmap_run(l->map, blk, bitmap_blocks(end) - off / BLOCK_SIZE, held);",
       "layer.c", "to = (blk + blocks) * BLOCK_SIZE;",
       "to = (off / BLOCK_SIZE + blocks) * BLOCK_SIZE;",
       "layer.c", "bitmap_set(l->map, blk, blocks, how == WAIT)",
       "bitmap_set(l->map, (uint32_t)off / BLOCK_SIZE, blocks, how == WAIT)",
       tests="test_cow.py::test_places_above_4_gib_are_their_own")
mutant("a full disk is an I/O error", "overlay's disk full",
       "proto.c", "{ ENOSPC, NBD_ENOSPC }, ", "",
       tests="test_cow.py::test_full_overlay_disk_is_enospc_for_that_write")
mutant("an error of the overlay is not told", "overlay's disk full",
       "conn.c", "if (!whole->error)", "if (false)",
       tests="test_faults.py::test_calls_that_fail")
mutant("an overlay is used with any base", "overlay truncated or of another base",
       "bitmap.c", "if (get_le(p + 32, 8) != b->id.fingerprint)", "if (false)",
       tests="test_cow.py::test_spoilt_overlay_is_refused_and_not_touched")
mutant("an overlay may be short", "overlay truncated or of another base",
       "target.c", "if (!l->disk || l->disk->size == l->size)", "if (true)",
       tests="test_cow.py::test_spoilt_overlay_is_refused_and_not_touched")

# The bitmap file, and what is durable

mutant("the bits are committed before the data is", "bitmap reaches the disk before the data",
       "bitmap.c",
       "err = disk_sync(image);\n\t\tif (!err)\n\t\t\terr = write_committed(b, n);",
       "err = write_committed(b, n);\n\t\tif (!err)\n\t\t\terr = disk_sync(image);",
       tests="test_powercut.py::test_all_sequences_of_up_to_three_operations")
mutant("bits that were set during the sync are committed",
       "bitmap reaches the disk before the data",
       "bitmap.c", "n = take_dirty(b, &page);\n\t\terr = disk_sync(image);",
       "err = disk_sync(image);\n\t\tn = take_dirty(b, &page);",
       tests="test_powercut.py::test_random_operations_and_power_cuts "
             "test_powercut.py::test_commit_without_a_flush "
             "test_cow.py::test_flush_syncs_the_data_then_the_map_then_answers")
mutant("the data is not synced before the bits", "bitmap reaches the disk before the data",
       "bitmap.c", "\t\terr = disk_sync(image);\n", "\t\terr = 0;\n\t\t(void)image;\n",
       tests="test_powercut.py::test_all_sequences_of_up_to_three_operations")
mutant("the bits are not synced", "bitmap reaches the disk before the data",
       "bitmap.c", "return !err && n > 0 ? sync_file(b) : err;", "return err;",
       tests="test_powercut.py::test_all_sequences_of_up_to_three_operations")
mutant("that clients write is not synced before their bits",
       "bitmap reaches the disk before the data",
       "bitmap.c", "if (!b->written_is_stable && atomic_load(&b->flags) & BITMAP_WRITTEN) {", "if (false) {",
       tests="test_cow.py::"
             "test_first_change_is_told_and_has_its_space_before_it_is_recorded")
mutant("a change is told after it was made", "bitmap reaches the disk before the data",
       "layer.c", "int ret = begin_change(layer_of(b), len, off);\n\n\treturn ret ? ret : write_range(",
       "int ret = write_range(layer_of(b), buf, len, off, how);\n\n"
       "\treturn ret ? ret : begin_change(layer_of(b), len, off);\n\treturn write_range(",
       tests="test_cow.py::"
             "test_first_change_is_told_and_has_its_space_before_it_is_recorded")
mutant("a set bit does not mark its page", "bitmap reaches the disk before the data",
       "bitmap.c", "atomic_fetch_or(&b->page[page], DIRTY);",
       "atomic_fetch_or(&b->page[0], DIRTY);",
       tests="test_cow.py::test_power_cut_keeps_a_write_across_pages_of_the_map "
             "test_powercut.py::test_a_flush_commits_all_pages_of_a_large_map")
mutant("the live map is believed after a reboot", "the live map is believed after a reboot",
       "bitmap.c", "if (memcmp(b->boot_id, header + 40, BOOT_ID_SIZE) != 0)", "if (false)",
       tests="test_cow.py::test_power_cut_keeps_what_was_made_durable "
             "test_powercut.py::test_random_operations_and_power_cuts")
mutant("the live map is believed on a file system that was mounted again",
       "the live map is believed after a reboot",
       "bitmap.c", "return a == 0 || b == 0 || a == b;", "(void)a, (void)b;\n\treturn true;",
       tests="test_cow.py::test_live_map_of_another_instance_is_not_believed")
mutant("an instance that is not known is another one", "kill -9 loses what was acknowledged",
       "bitmap.c", "return a == 0 || b == 0 || a == b;", "return a == b;",
       tests="test_cow.py::test_live_map_of_an_unknown_instance_is_believed")
mutant("only the image's instance counts", "the live map is believed after a reboot",
       "bitmap.c", "!is_same_instance(b->own_instance, get_le(header + 72, 8))", "false",
       tests="test_cow.py::test_live_map_of_another_instance_is_not_believed")
mutant("a live map that is not believed stays", "the live map is believed after a reboot",
       "bitmap.c", "return err ? err : empty_live_map(b);",
       "(void)empty_live_map;\n\treturn err;",
       tests="test_cow.py::test_live_map_of_another_instance_is_not_believed "
             "test_kill.py::test_kill_while_the_live_map_is_emptied")
mutant("a start that empties the live map cannot be repeated",
       "the live map is believed after a reboot",
       "bitmap.c", "if (size != file_bytes(b) && size != file_bytes(b) - b->map_bytes)",
       "if (size != file_bytes(b))",
       tests="test_cow.py::"
             "test_start_that_was_killed_while_it_emptied_the_live_map_goes_on "
             "test_kill.py::test_kill_while_the_live_map_is_emptied")
mutant("the live map is never believed", "kill -9 loses what was acknowledged",
       "bitmap.c", "if (memcmp(b->boot_id, header + 40, BOOT_ID_SIZE) != 0)", "if (true)",
       tests="test_proxy.py::test_kill_loses_nothing "
             "test_cow.py::test_kill_without_a_power_cut_believes_the_live_map")
mutant("bits are not recorded", "kill -9 loses what was acknowledged",
       "bitmap.c", "err = write_map(b, buf, bytes, HEADER_SIZE + b->map_bytes + first);",
       "err = 0;",
       tests="test_cow.py::test_kill_without_a_power_cut_believes_the_live_map "
             "test_proxy.py::test_kill_loses_nothing")
mutant("bits are recorded before their data is stored", "block marked before its data arrived",
       "layer.c", "int ret = buf ? disk_write(l->disk, buf, len, off, how) : "
       "disk_zero(l->disk, len, off, 0);\n\n\tret = set_held(l, len, off, ret, how);",
       "int ret = set_held(l, len, off, 0, how);\n\n\tif (ret == 0)\n"
       "\t\tret = buf ? disk_write(l->disk, buf, len, off, how) :\n"
       "\t\t      disk_zero(l->disk, len, off, 0);",
       tests="test_kill.py::test_kill_at_each_system_call "
             "test_powercut.py::test_all_sequences_of_up_to_three_operations")
mutant("a record forgets its neighbours", "kill -9 loses what was acknowledged",
       "bitmap.c", "buf[i] = atomic_load_explicit(&b->live[first + i], memory_order_relaxed) |\n"
       "\t\t\t bits_of(first + i, blk, end);",
       "buf[i] = bits_of(first + i, blk, end);",
       tests="test_powercut.py::test_all_pairs_with_a_kill_between_them "
             "test_kill.py::test_kill_at_random_moments")
mutant("a record that found no space counts", "overlay's disk full",
       "bitmap.c", "if (err)\n\t\t\treturn err;\n\t\tatomic_fetch_or(&b->page[page], TAKEN);",
       "atomic_fetch_or(&b->page[page], TAKEN);",
       "bitmap.c", "if (err)\n\t\treturn err;\n\tset_bits(b, blk, end);", "set_bits(b, blk, end);",
       tests="test_cow.py::test_record_that_finds_no_space_is_that_requests_error")
mutant("the committed map takes no space before it is needed", "overlay's disk full",
       "bitmap.c", "if (!(atomic_load(&b->page[page]) & TAKEN)) {", "if (false) {",
       tests="test_cow.py::"
             "test_first_change_is_told_and_has_its_space_before_it_is_recorded")
mutant("the committed map's space is taken again", "bitmap reaches the disk before the data",
       "bitmap.c", "return load_map(b, live, DIRTY | TAKEN);", "return load_map(b, live, DIRTY);",
       tests="test_cow.py::"
             "test_record_after_a_restart_takes_nothing_from_the_committed_map "
             "test_powercut.py::test_all_pairs_with_a_kill_between_them")
mutant("a full disk ends the export", "overlay's disk full",
       "bitmap.c", "if (err && !momentary)", "if (err || momentary)",
       tests="test_cow.py::test_commit_that_finds_no_space_is_tried_again")
mutant("what a killed server set is never committed", "kill -9 loses what was acknowledged",
       "bitmap.c", "return load_map(b, live, DIRTY | TAKEN);", "return load_map(b, live, TAKEN);",
       tests="test_powercut.py::test_all_pairs_with_a_kill_between_them "
             "test_cow.py::test_flush_after_a_kill_commits_what_the_one_before_wrote")
mutant("a bitmap of version 1 is refused", "kill -9 loses what was acknowledged",
       "bitmap.c", "if (version != 1 && version != VERSION)", "if (version != VERSION)",
       tests="test_cow.py::test_overlay_of_version_1_goes_on")
mutant("FLUSH is answered before its commit", "bitmap reaches the disk before the data",
       "layer.c",
       "\tif (atomic_load(&l->begun) == r->commits)\n\t\tcommit(l);\n\trequest_done(r, l->result);",
       "\tuint64_t begun = r->commits;\n\n\trequest_done(r, l->result);\n"
       "\tif (atomic_load(&l->begun) == begun)\n\t\tcommit(l);",
       tests="test_powercut.py::test_all_sequences_of_up_to_three_operations")
mutant("FLUSH joins a commit that has begun", "bitmap reaches the disk before the data",
       "layer.c", "\tatomic_fetch_add(&l->begun, 1);\n\tl->result = end_commit(l, make_durable(l), false);\n",
       "\tl->result = end_commit(l, make_durable(l), false);\n\tatomic_fetch_add(&l->begun, 1);\n",
       tests="test_powercut.py::test_random_operations_and_power_cuts")
mutant("a failed fdatasync() is tried again", "fdatasync fails, the next one succeeds",
       "disk.c", "\twhile (!d->error && fdatasync(d->fd) < 0)\n\t\tif (errno != EINTR)\n"
       "\t\t\td->error = -errno;\n\tpthread_mutex_unlock(&d->syncing);\n\treturn d->error;\n}\n\n"
       "int disk_check",
       "\tint err = 0;\n\n\twhile (!err && fdatasync(d->fd) < 0)\n\t\tif (errno != EINTR)\n"
       "\t\t\terr = -errno;\n\tpthread_mutex_unlock(&d->syncing);\n\treturn err;\n}\n\n"
       "int disk_check",
       tests="test_faults.py::test_failed_sync_is_told_once_in_the_log_and_with_every_flush")
mutant("a cache or an overlay goes on after a failed fdatasync()",
       "fdatasync fails, the next one succeeds",
       "layer.c", "atomic_store(&l->backend.failed, l->map != NULL);", "",
       tests="test_cow.py::test_failed_sync_ends_the_export_and_its_data_is_never_committed")
mutant("the file does not tell that stable storage has failed",
       "fdatasync fails, the next one succeeds",
       "layer.c", "if (l->durable)\n\t\tbitmap_tell(l->map, BITMAP_FAILED, false);", "",
       tests="test_cow.py::test_failed_sync_ends_the_export_and_its_data_is_never_committed "
             "test_proxy.py::test_restart_after_a_failed_sync_has_what_was_committed_before")
mutant("the live map is believed though stable storage had failed",
       "fdatasync fails, the next one succeeds",
       "bitmap.c", "(is_2 && get_le(header + 60, 4) & BITMAP_FAILED)", "false",
       tests="test_cow.py::test_live_map_is_not_believed_when_stable_storage_had_failed "
             "test_proxy.py::test_restart_after_a_failed_sync_has_what_was_committed_before")
mutant("that stable storage has failed is told for ever", "fdatasync fails, the next one succeeds",
       "bitmap.c", "atomic_init(&b->flags, flags & (BITMAP_WHOLE | BITMAP_WRITTEN));",
       "atomic_init(&b->flags, flags);",
       tests="test_cow.py::test_live_map_is_not_believed_when_stable_storage_had_failed")
mutant("a record that fails is no loss", "fdatasync fails, the next one succeeds",
       "layer.c", "if (ret != 0 && ret != -EAGAIN && bitmap_has_failed(l->map))", "if (false)",
       tests="test_cow.py::test_record_that_fails_ends_the_export")
mutant("a failed fdatasync() is no error", "fdatasync fails, the next one succeeds",
       "disk.c",
       "while (!d->error && fdatasync(d->fd) < 0)\n\t\tif (errno != EINTR)\n\t\t\td->error = -errno;",
       "while (!err && fdatasync(d->fd) < 0)\n\t\tif (errno != EINTR)\n\t\t\tbreak;",
       tests="test_cow.py::test_failed_sync_ends_the_export_and_its_data_is_never_committed")
mutant("nothing is committed but by FLUSH", "what was not flushed is never committed",
       "layer.c", "if (l->durable)\n\t\t\tcommit_soon(l);", "",
       tests="test_proxy.py::test_commit_comes_by_itself_after_a_second "
             "test_powercut.py::test_commit_without_a_flush")
mutant("jobs for later are forgotten", "what was not flushed is never committed",
       "worker.c", "(pool.stop || job->due <= now_ms())", "pool.stop",
       tests="test_proxy.py::test_commit_comes_by_itself_after_a_second")
mutant("an orderly end commits nothing", "what was not flushed is never committed",
       "layer.c", "int err = l->durable ? end_commit(l, make_durable(l), true) : 0;", "int err = 0;",
       "worker.c", "(pool.stop || job->due <= now_ms())", "job->due <= now_ms()",
       tests="test_proxy.py::test_orderly_end_commits_what_is_cached "
             "test_cow.py::test_orderly_end_commits_what_was_not_flushed")
mutant("a bitmap of another disk is taken", "bitmap of another disk",
       "bitmap.c", "if (get_le(p + 24, 8) != b->id.disk_size)", "if (false)",
       tests="test_proxy.py::test_origin_of_another_size_is_refused "
             "test_proxy.py::test_spoilt_cache_is_refused_until_the_bitmap_is_cleared")
mutant("a bitmap may be short", "bitmap truncated or garbage",
       "bitmap.c", "if (size != file_bytes(b) && size != file_bytes(b) - b->map_bytes)",
       "if (false)",
       tests="test_proxy.py::test_spoilt_cache_is_refused_until_the_bitmap_is_cleared")
mutant("a bitmap's header may be garbage", "bitmap truncated or garbage",
       "bitmap.c", "if (get_le(p + checked, 8) != bitmap_checksum(BITMAP_CHECKSUM, p, checked))", "if (false)",
       tests="test_proxy.py::test_spoilt_cache_is_refused_until_the_bitmap_is_cleared "
             "test_cow.py::test_spoilt_overlay_is_refused_and_not_touched")
mutant("the checksum leaves out what version 2 has added", "bitmap truncated or garbage",
       "bitmap.c", "if (get_le(p + checked, 8) != bitmap_checksum(BITMAP_CHECKSUM, p, checked))",
       "if (get_le(p + checked, 8) != bitmap_checksum(BITMAP_CHECKSUM, p, CHECKED_SIZE_1))",
       "bitmap.c", "put_le(p + 80, bitmap_checksum(BITMAP_CHECKSUM, p, CHECKED_SIZE), 8);",
       "put_le(p + 80, bitmap_checksum(BITMAP_CHECKSUM, p, CHECKED_SIZE_1), 8);",
       tests="test_cow.py::test_spoilt_overlay_is_refused_and_not_touched")
mutant("two servers have one bitmap", "another server uses the cache",
       "bitmap.c", "|| flock(b->fd, LOCK_EX | LOCK_NB) < 0 ", "",
       tests="test_proxy.py::test_second_server_on_a_bitmap_is_refused")
mutant("a lost cache image is made anew", "cache image deleted or shorter, bitmap kept",
       "cache.c", "held > 0 && !is_device", "held > 0 && l->disk && !is_device",
       tests="test_proxy.py::test_spoilt_cache_is_refused_until_the_bitmap_is_cleared")
mutant("a short cache image is extended", "cache image deleted or shorter, bitmap kept",
       "cache.c", "held > 0 && !is_device", "held > 0 && !l->disk",
       tests="test_proxy.py::test_spoilt_cache_is_refused_until_the_bitmap_is_cleared")

# The proxy

mutant("a block counts as cached before its data arrived", "block marked before its data arrived",
       "fetch.c", "r->lacks = len;",
       "r->lacks = len;\n\tif (r->h.cmd != NBD_CMD_BLOCK_STATUS)\n"
       "\t\tbitmap_set(fetch->f->layer->map, r->at.off / BLOCK_SIZE, 1, true);",
       tests="test_kill.py::test_kill_at_each_system_call "
             "test_origin.py::test_writes_to_a_block_that_is_being_fetched")
mutant("late data of the origin wins", "lands after a newer write",
       "layer.c", "if (!held)\n\t\t\tret = hold ?", "if (true)\n\t\t\tret = hold ?",
       tests="test_origin.py::test_late_data_does_not_overwrite_a_write "
             "test_proxy.py::test_late_data_of_the_origin_does_not_overwrite_what_is_newer")
mutant("a change that is stored at once takes nothing from older ones",
       "lands after a newer write",
       "backend.c", "order_end(&r->change, ret == 0 || hint, ret == 0);",
       "order_end(&r->change, ret == 0 || hint, ret == 0 && how == WAIT);",
       tests="test_order.py::test_newer_writes_outlive_those_that_waited_for_the_origin")
mutant("a change that waited takes nothing from older ones", "lands after a newer write",
       "backend.c", "order_end(&r->change, ret == 0 || hint, ret == 0);",
       "order_end(&r->change, ret == 0 || hint, ret == 0 && how == TRY);",
       tests="test_order.py::"
             "test_overlapping_writes_that_wait_end_in_the_order_of_their_arrival "
             "test_order.py::test_newer_change_outlives_one_that_the_disk_held_up_on_a_worker")
mutant("a change that waits has no place in the order", "lands after a newer write",
       "backend.c", "return go_on_with_change(r, how);",
       "int ret = go_on_with_change(r, how);\n\n\torder_remove(&r->change);\n\treturn ret;",
       tests="test_order.py::test_newer_writes_outlive_those_that_waited_for_the_origin")
mutant("a client is always there", "lands after a newer write",
       "conn.c", "uint64_t now;\n\n\tif (c->gone)\n\t\treturn c->orderly;",
       "uint64_t now;\n\n\tif (true)\n\t\treturn true;",
       tests="test_order.py::"
             "test_requests_behind_one_that_the_disk_holds_up_are_not_carried_out")
mutant("who is gone was never there in order", "a request in flight is never answered",
       "conn.c", "if (h.cmd == NBD_CMD_DISC)\n\t\t\treturn true;\n\t\tpos += size",
       "if (h.cmd == NBD_CMD_DISC)\n\t\t\treturn false;\n\t\tpos += size",
       tests="test_order.py::test_many_writes_before_disc_are_carried_out")
mutant("who is gone has always left in order", "lands after a newer write",
       "conn.c", "c->orderly = receive_rest(c) && has_disc(c);",
       "(void)has_disc;\n\tc->orderly = receive_rest(c);",
       tests="test_order.py::"
             "test_requests_behind_one_that_the_disk_holds_up_are_not_carried_out")
mutant("a fetch is stored beside writes",
       "partial write and full write of one absent block race with its fetch",
       "layer.c",
       "if (!order_hold(&l->disk->order, &alone, len, off, how == WAIT))\n\t\treturn -EAGAIN;",
       "memset(&alone, 0, sizeof(alone));",
       tests="test_proxy.py::test_clients_at_the_same_moment_all_win "
             "test_proxy.py::test_model_agrees_whatever_the_origin_does "
             "test_proxy.py::test_random_operations_agree_with_a_model")
mutant("replies are matched in order", "replies matched in order of sending",
       "origin.c", "r = find_owed(l, proto_reply_cookie(p));", "r = l->owed.first;",
       tests="test_origin.py::test_replies_come_in_any_order")
mutant("an old cookie is good enough", "wrong magic, wrong cookie",
       "origin.c", "while (r && r->cookie != cookie)", "while (r && r->cookie % 512 != cookie % 512)",
       tests="test_origin.py::test_wrong_replies_cost_the_link_and_nothing_else")
mutant("the origin's magic number may be wrong", "wrong magic, wrong cookie",
       "proto_client.c", "if (!simple && get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC)",
       "simple = get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC;\n\tif (false)",
       tests="test_origin.py::test_wrong_replies_cost_the_link_and_nothing_else")
mutant("a chunk is checked by addition", "a chunk outside the request",
       "proto_client.c", "len > gap->to - off))", "(uint32_t)(off + len) > gap->to))",
       tests="test_origin.py::test_wrong_replies_cost_the_link_and_nothing_else")
mutant("chunks may leave gaps", "a chunk outside the request",
       "proto_client.c", "if (!a->error && (a->gaps > 0 ||", "if (!a->error && (",
       tests="test_origin.py::test_wrong_replies_cost_the_link_and_nothing_else")
mutant("a chunk may have any size", "an error text of 4 GiB",
       "proto_client.c", "if (len < kind->min || len > kind->max)", "if (false)",
       tests="test_origin.py::test_wrong_replies_cost_the_link_and_nothing_else "
             "test_origin.py::test_announced_gigabytes_cost_no_memory")
mutant("memory is taken for what an origin announces", "an error text of 4 GiB",
       "proto_client.c", "len = get_be32(p + 16);",
       "len = get_be32(p + 16);\n" + TAKE.format("len"),
       "proto_client.c", "#include <stdio.h>", "#include <stdio.h>\n#include <stdlib.h>",
       tests="test_origin.py::test_announced_gigabytes_cost_no_memory")
mutant("what is no reply is a simple one", "a byte too few, twice, or changed",
       "proto_client.c", "if (!simple && get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC)",
       "simple = get_be32(p) != NBD_STRUCTURED_REPLY_MAGIC;\n\tif (false)",
       tests="test_origin.py::test_spoilt_byte_never_spoils_data")
mutant("the range of a chunk is not looked at", "origin sends anything",
       "proto_client.c", "if (gap == end || len == 0)\n\t\treturn", "r->off = off;\n\tr->len = len;\n"
       "\tif (gap == end || len == 0)\n\t\treturn len > 0 ? NULL :",
       tests="test_origin.py::test_random_replies_never_spoil_data "
             "test_origin.py::test_wrong_replies_cost_the_link_and_nothing_else")
mutant("a disk may be larger than 2^63", "a size over 2^63",
       "proto_client.c", "if (o->size > INT64_MAX)", "if (false)",
       tests="test_origin.py::test_origin_that_cannot_be_used_is_refused_at_start")
mutant("a hole of the origin keeps what the buffer had", "a chunk outside the request",
       "origin.c",
       "if (reply->type == NBD_REPLY_TYPE_OFFSET_HOLE && l->place)\n"
       "\t\tmemset(l->place, 0, reply->len);",
       "",
       tests="test_origin.py::test_replies_come_in_any_order "
             "test_origin.py::test_unusual_replies_are_understood")
mutant("an extent may be empty", "extents that are wrong",
       "proto_client.c", "if (e.len == 0)", "if (false)",
       tests="test_origin.py::test_wrong_extents_cost_the_link_and_nothing_else")
mutant("a hole counts as zeros in the copy", "extents that are wrong",
       "copy.c", "e->flags & NBD_STATE_ZERO", "e->flags & NBD_STATE_HOLE",
       tests="test_origin.py::test_unusual_extents_are_understood")
mutant("what a lost link owed is not asked again", "origin closes at every byte",
       "origin.c", "request_add(l->origin, r);\n\t}", "}",
       tests="test_origin.py::test_links_that_come_and_go_lose_nothing")
mutant("an origin that closed at the start is waited for", "origin closes at every byte",
       "origin.c", "if (n == 0)\n\t\treturn l->state == LINK_UP ?",
       "if (n == 0)\n\t\tl->deadline = now_ms() + 5000;\n"
       "\tif (n == 0)\n\t\treturn l->state != LINK_UP ? NULL :"
       " l->state == LINK_UP ?",
       tests="test_origin.py::test_origin_that_closes_at_every_byte_of_the_handshake_is_refused")
mutant("an origin that says nothing is waited for", "origin never answers",
       "origin.c", "if (l->state != LINK_UP)\n\t\treturn \"no answer\";",
       "if (l->state != LINK_UP)\n\t\treturn NULL;",
       tests="test_origin.py::test_silent_origin_is_refused_at_start")
mutant("an origin's handshake may go on for ever", "origin never ends its answer",
       "origin.c", "if (l->state != LINK_UP)\n\t\treturn \"no answer\";",
       "if (l->state != LINK_UP)\n\t\treturn NULL;",
       tests="test_origin.py::test_handshake_that_never_ends_is_given_up")
mutant("a lock is held while the origin is waited for", "origin black-holed",
       "origin.c", "loop_poll(&o->loop, o->trim);",
       "pthread_mutex_lock(&o->lock);\n\tloop_poll(&o->loop, o->trim);\n"
       "\tpthread_mutex_unlock(&o->lock);",
       tests="test_control.py::test_commands_work_while_the_origin_is_frozen")
mutant("a silent origin is waited for", "noticed by a deadline",
       "origin.c", "return l->count == 0 || l->clogged ? UINT64_MAX", "return true ? UINT64_MAX",
       tests="test_origin.py::test_silence_is_noticed_in_time "
             "test_proxy.py::test_silent_origin_is_noticed_by_the_deadline")
mutant("an answer that is lost among others is waited for", "noticed by a deadline",
       "origin.c", "sent >= link_patience(l, l->owed.first->sent / 1000)", "sent > UINT64_MAX / 2",
       tests="test_origin.py::test_answer_that_is_lost_among_others_is_noticed")
mutant("a lost origin is not tried again", "origin restarted with other clients connected",
       "origin.c", "l->deadline = now_ms() + l->backoff;", "l->deadline = UINT64_MAX;",
       tests="test_origin.py::test_all_but_misses_goes_on_without_the_origin "
             "test_proxy.py::test_cached_blocks_need_no_origin_and_others_wait_for_it")
mutant("a lost origin is tried again at once", "origin that is always wrong",
       "origin.c", "l->deadline = now_ms() + l->backoff;", "l->deadline = now_ms();",
       tests="test_origin.py::test_origin_that_is_always_wrong_is_not_asked_all_the_time "
             "test_origin.py::test_attempts_back_off")
mutant("a cached read waits for the origin", "one dead origin stalls every client",
       "cache.c", "static const struct backend_source cache_source",
       "static int cache_read(struct backend *b, uint8_t *buf, uint64_t len, uint64_t off, enum how how)\n"
       "{\n\tstruct cache *c = to_cache(b);\n\tstruct origin_status s;\n\n"
       "\tif (!layer_holds(&c->layer, len, off))\n\t\treturn ABSENT;\n"
       "\tfor (origin_status(c->origin, &s); !s.links; origin_status(c->origin, &s))\n"
       "\t\tusleep(1000);\n\treturn disk_read(c->layer.disk, buf, len, off, how);\n}\n\n"
       "static const struct backend_source cache_source",
       "cache.c", "readonly, \"the cache\");",
       "readonly, \"the cache\");\n\tstatic struct backend_ops ops;\n"
       "\tops = *c->layer.backend.ops;\n\tops.read = cache_read;\n\tc->layer.backend.ops = &ops;",
       tests="test_proxy.py::test_cached_blocks_need_no_origin_and_others_wait_for_it")
mutant("an error of the origin is for all who wait", "one EIO of the origin",
       "fetch.c", "(fetch->ask.error == -EIO && wider) ||", "(false && wider) ||",
       tests="test_origin.py::test_error_is_for_the_block_and_not_for_what_came_with_it "
             "test_proxy.py::test_error_of_a_long_fetch_is_not_for_who_needs_a_part_of_it")
mutant("an error of the origin is not told", "one EIO of the origin",
       "origin.c", "int error = r->answer.error ? -EIO : 0;", "int error = 0;",
       tests="test_origin.py::test_error_concerns_only_those_who_need_the_block "
             "test_proxy.py::test_error_of_the_origin_is_eio_for_who_needs_that_block")
mutant("an origin of another size is taken", "reconnect to a disk of another size",
       "origin.c", "if (offer->size == limits->size &&", "if (",
       tests="test_origin.py::test_another_size_after_a_reconnect_is_refused "
             "test_origin.py::test_reconnect_to_another_size_is_refused")
mutant("a request has 31 missing pieces at most",
       "32 or more separate missing pieces in one request",
       "fetch.c", "pass(r, part.len);", "pass(r, ++r->pieces < 32 ? part.len : r->at.len);",
       tests="test_proxy.py::test_read_of_many_missing_pieces "
             "test_origin.py::test_request_of_many_missing_pieces")
mutant("who joins a fetch gets its beginning", "32 or more separate missing pieces in one request",
       "fetch.c", "fetch->ask.buf + (r->at.off - fetch->ask.off)", "fetch->ask.buf",
       tests="test_proxy.py::test_block_is_fetched_once_however_many_want_it "
             "test_origin.py::test_block_is_fetched_once_for_all_who_wait "
             "test_proxy.py::test_cold_reads_of_all_lengths_are_right")
mutant("a full disk is an error of the READ", "disk full while caching a read",
       "fetch.c", "else if (r->h.cmd == NBD_CMD_READ && !fetch->ask.error)",
       "else if (r->h.cmd == NBD_CMD_READ && !error)",
       tests="test_proxy.py::test_full_disk_is_enospc_for_writes_and_nothing_for_reads")
mutant("a WRITE that found no room is marked", "disk full on a write",
       "layer.c", "if (ret == 0) {\n\t\tret = check_map(",
       "if (ret != 0 && ret != -EAGAIN)\n\t\tbitmap_set(l->map, blk, blocks, true);\n"
       "\tif (ret == 0) {\n\t\tret = check_map(",
       tests="test_proxy.py::test_full_disk_is_enospc_for_writes_and_nothing_for_reads")
mutant("what waits for the origin is not bounded", "a bound on what waits for a dead origin",
       "conn.c", "IN_FLIGHT_MAX, &load.requests, load.requests_max)", "IN_FLIGHT_MAX, &load.requests, SIZE_MAX)",
       tests="test_proxy.py::test_limits_hold_while_the_origin_is_stopped")
mutant("memory for what waits for the origin is not bounded",
       "a bound on what waits for a dead origin",
       "conn.c", "BUFFERED_MAX, &load.bytes, load.bytes_max)", "BUFFERED_MAX, &load.bytes, SIZE_MAX)",
       tests="test_proxy.py::test_limits_hold_while_the_origin_is_stopped")
mutant("what is not cached is a hole", 'a proxy never reports "not cached" as a hole',
       "fetch.c", "r->extent[0] = (struct extent){ s->len, 0 };",
       "r->extent[0] = (struct extent){ s->len, NBD_STATE_HOLE | NBD_STATE_ZERO };",
       tests="test_proxy.py::test_absent_blocks_are_not_holes")
mutant("the copy goes before clients", "the copy starves clients",
       "origin.c",
       "for (unsigned i = 0; i < ORIGIN_PRIORITIES; i++)\n\t\twhile ((l",
       "for (unsigned i = ORIGIN_PRIORITIES; i-- > 0;)\n\t\twhile ((l",
       tests="test_origin.py::test_clients_go_before_the_copy "
             "test_origin.py::test_clients_go_first_when_the_origin_is_back")
mutant("what the copy brings is stored before what a client waits for", "the copy starves clients",
       "fetch.c", "atomic_load(&fetch->f->demanded) > 0", "false",
       tests="test_faults.py::test_copy_that_waits_for_the_disk_does_not_keep_a_miss_waiting")
mutant("random reads are read ahead", "the copy starves clients",
       "fetch.c", "uint64_t ahead = 0,", "uint64_t ahead = 2 * len,",
       tests="test_origin.py::test_random_reads_are_not_read_ahead")

# The switch

mutant("the switch does not wait for blocks", "switch while a block is in flight",
       "cache.c", "if (s.held < s.blocks && !force) {", "if (false) {",
       tests="test_proxy.py::test_switch_is_refused_with_the_numbers_while_blocks_are_missing")
mutant("99.95 % is 100 %", "100 percent while a block is missing",
       "cache.c", "status->held * 1000 / status->blocks",
       "(status->held * 1000 + status->blocks / 2) / status->blocks",
       tests="test_control.py::test_percent_is_100_only_when_all_is_here")
mutant("what is missing keeps what the image had", "switch while a block is in flight",
       "layer.c", "fill_run(l, buf, n, off, how) : disk_zero(l->disk, n, off, 0);",
       "fill_run(l, buf, n, off, how) : 0;",
       tests=
       "test_proxy.py::test_forced_switch_zeroes_what_the_image_has_in_the_place_of_absent_blocks")
mutant("what is missing is held as soon as it is zeros", "switch while a block is in flight",
       "layer.c", "ret = hold ? fill_run(l, buf, n, off, how) : disk_zero(l->disk, n, off, 0);",
       "(void)hold, ret = fill_run(l, buf, n, off, how);",
       tests="test_kill.py::test_forced_switch_that_is_killed_has_happened_or_not "
             "test_proxy.py::test_forced_switch_whose_sync_fails_leaves_the_origins_blocks")
mutant("the switch leaves who waits for the origin", "a request in flight is never answered",
       "cache.c", "origin_cancel(c->origin);\n\tif (c->zeroed)", "if (c->zeroed)",
       tests="test_proxy.py::test_forced_switch_answers_those_who_wait_for_the_origin")
mutant("who comes during the switch gets errors", "a client connecting meanwhile is lost",
       "layer.c", "int err = disk_sync(l->disk);\t/* most of it",
       "int err = (atomic_store(&l->backend.failed, true), poll(NULL, 0, 200),\n"
       "\t\t   atomic_store(&l->backend.failed, false), disk_sync(l->disk));\t/* most of it",
       tests="test_proxy.py::test_clients_that_connect_during_the_switch_are_served")
mutant("who had no room is forgotten", "requests that wait shut out those that need not",
       "clients.c", "(admit || stop); i++)", "stop; i++)",
       tests="test_order.py::test_client_that_found_no_room_goes_on_when_others_have_left")
mutant("a client that does not read keeps the switch", "it may not stop the switch",
       "conn.c", "/* Workspaces */", "atomic_uint backlogs;\n\n/* Workspaces */",
       "conn.c", "\t\tc->backlog = tx_rest(tx);",
       "{\n\t\tc->backlog = tx_rest(tx);\n\t\tatomic_fetch_add(&backlogs, 1);\n\t}",
       "conn.c", "if (c->backlog) {\n\t\ttx_free(c->backlog);",
       "if (c->backlog) {\n\t\tatomic_fetch_sub(&backlogs, 1);\n\t\ttx_free(c->backlog);",
       "cache.c", "if (!atomic_exchange(&c->switch_done, false))",
       "extern atomic_uint backlogs;\n"
       "\tif (atomic_load(&backlogs) != 0 || !atomic_exchange(&c->switch_done, false))",
       tests="test_proxy.py::test_deaf_client_does_not_delay_the_switch")
mutant("the switch syncs nothing", "switch without fdatasync of the image",
       "layer.c", "? -EBUSY : disk_sync(l->disk);", "? -EBUSY : 0;",
       "layer.c", "int err = disk_sync(l->disk);\t/* most of it", "int err = 0;\t/* most of it",
       tests="test_proxy.py::test_switch_syncs_the_image_before_it_says_so "
             "test_powercut.py::test_switch_leaves_an_image_that_is_complete_and_durable")
mutant("the header says that all is held before the image is durable",
       "switch without fdatasync of the image",
       "layer.c", "int err = disk_sync(l->disk);\t/* most of it",
       "int err = bitmap_tell(l->map, BITMAP_WHOLE, true);\t/* most of it",
       tests="test_proxy.py::test_switch_holds_all_blocks_once_the_image_is_durable "
             "test_powercut.py::test_switch_leaves_an_image_that_is_complete_and_durable")
mutant("the header that says that all is held is not synced",
       "switch without fdatasync of the image",
       "layer.c", "bitmap_tell(l->map, BITMAP_WHOLE, true);",
       "bitmap_tell(l->map, BITMAP_WHOLE, false);",
       tests="test_proxy.py::test_switch_holds_all_blocks_once_the_image_is_durable")
mutant("all is held in memory alone", "switch without fdatasync of the image",
       "bitmap.c", "if (flags != atomic_load(&b->flags))\n",
       "if (flags != atomic_load(&b->flags) && flag != BITMAP_WHOLE)\n",
       tests="test_proxy.py::test_switched_cache_outlives_a_power_cut_without_any_bit")
mutant("a start forgets that all is held", "switch without fdatasync of the image",
       "bitmap.c", "atomic_init(&b->flags, flags & (BITMAP_WHOLE | BITMAP_WRITTEN));",
       "atomic_init(&b->flags, flags & BITMAP_WRITTEN);",
       tests="test_proxy.py::test_second_switch_that_fails_takes_nothing_from_the_first")
mutant("a switch that fails undoes an earlier one", "fdatasync fails, the next one succeeds",
       "bitmap.c", "if (!err)\n\t\tatomic_store(&b->flags, flags);",
       "atomic_store(&b->flags, err ? flags & ~(unsigned)flag : flags);",
       tests="test_proxy.py::test_second_switch_that_fails_takes_nothing_from_the_first")
mutant("the switch goes on though the image is not durable",
       "fdatasync fails, the next one succeeds",
       "cache.c", "c->error = -err;", "c->error = 0 * err;",
       tests="test_proxy.py::test_switch_is_refused_when_the_data_cannot_be_made_durable")
mutant("the switch gives the disk the size of the image", "switch changes the disk's size",
       "cache.c", "l->disk->size = size;", "",
       "ctl.c", "if (!cache_switch_ended(exports.cache, &error))\n",
       "if (exports.cache->switch_done)\n"
       "\t\texports.all[0].export.proto.size = exports.all[0].disk->size;\n"
       "\tif (!cache_switch_ended(exports.cache, &error))\n",
       "ctl.c", '#include "control.h"\n', '#include "control.h"\n#include "disk.h"\n',
       tests="test_proxy.py::test_larger_cache_image_keeps_the_origins_size")
mutant("a daemon forgets where it came from", "--daemonize: control acts on the wrong process",
       "listen.c", "absolute_path(sun->sun_path)", "strdup(sun->sun_path)",
       tests="test_proxy.py::test_daemon_works_from_any_directory")

mutant("a daemon leaves its pid file", "relative paths break after chdir",
       "xnbd.c", "server.pid_path = not_null(absolute_path(path));",
       "server.pid_path = strdup(path);",
       tests="test_service.py::test_prompt_returns_when_clients_can_connect "
             "test_proxy.py::test_daemon_works_from_any_directory")

# The control socket

mutant("anyone may control", "anyone may connect",
       "ctl.c", "listen_unix(o->control, 0600, accept_control)",
       "listen_unix(o->control, 0, accept_control)",
       tests="test_control.py::test_socket_is_for_the_owner_alone")
mutant("a control connection may be idle for ever",
       "an idle, half-sent, oversized or garbage message blocks the server",
       "ctl.c", "return now_ms() >= cl->due || (", "return (",
       tests="test_control.py::test_deadlines")
mutant("who does not read answers is waited for",
       "an idle, half-sent, oversized or garbage message blocks the server",
       "listen.c", "&len, SOCK_CLOEXEC | SOCK_NONBLOCK", "&len, SOCK_CLOEXEC",
       "ctl.c", "n = send(cl->source.fd, a->text, a->len, MSG_NOSIGNAL | MSG_DONTWAIT);",
       "n = send(cl->source.fd, a->text, a->len, MSG_NOSIGNAL);",
       tests="test_control.py::test_bad_client_disturbs_nobody "
             "test_control.py::test_answers_that_nobody_reads_take_no_memory")
mutant("a line without end is waited for", "an oversized message",
       "ctl.c", "if (!end && len < sizeof(cl->input))", "if (!end)",
       tests="test_control.py::test_line_without_end_costs_its_connection")
mutant("a copy goes on when who wanted it is gone", "a foreground cache-all stops",
       "ctl.c", "if (awaits_copy(cl))\n\t\tcopy_release(&exports.cache->copy, false);\n\tloop", "loop",
       tests="test_control.py::test_interrupted_cache_all_stops")
mutant("who is gone is not noticed", "bgctl killed at any point: server unaffected",
       "ctl.c", "n = send(cl->source.fd, a->text, a->len, MSG_NOSIGNAL | MSG_DONTWAIT);",
       "n = send(cl->source.fd, a->text, a->len, MSG_DONTWAIT);",
       "xnbd.c", "signal(SIGPIPE, SIG_IGN);", "",
       tests="test_control.py::test_bgctl_killed_at_random_moments "
             "test_control.py::test_command_of_a_client_that_left_at_once_is_carried_out")
mutant("a query forgets clients that have left",
       "an answer that is older than its question",
       "stats.c", "\ttally_add(&all.gone.all, &s->all, 1);\n", "",
       tests="test_stats.py::test_query_counts_what_was_answered_before")
mutant("a snapshot that was begun before is the one that was asked for",
       "an answer that is older than its question",
       "exports.c", "*behind = of->snapshot != NULL;", "*behind = false;",
       tests="test_stats.py::test_snapshot_asked_for_during_another_is_made_afterwards")
mutant("a view is as high as it is", "a view larger than its terminal",
       "bgctl.c", "terminal_size(STDOUT_FILENO).ws_row - 2 : 0", "60000 : 0",
       tests="test_stats.py::test_watch_fits_the_terminal")
mutant("a terminal has at least one column", "width 0",
       "bgctl.c", "w.ws_col == 0 ? 80 :", "",
       tests="test_control.py::test_bar_fits_the_terminal")
mutant("there is always a terminal", "progress bar without a terminal",
       "bgctl.c", "if (isatty(STDERR_FILENO)) {", "if (true) {",
       tests="test_control.py::test_progress_without_terminal_is_lines")

# Oracles: what a tester that looks away would not see

mutant("every second block is wrong", "oracle that compares every second block",
       "conn.c", "\tif (ret == 0) {\n\t\ttx_add(tx, data + len);",
       "\tif (ret == 0) {\n\t\tif (off / BLOCK_SIZE % 2)\n\t\t\tdata[len - 1] ^= 1;\n"
       "\t\ttx_add(tx, data + len);",
       tests="test_model.py::test_random_operations_agree_with_a_model")
mutant("the image and the replies are wrong alike",
       "oracle that compares with the server's own files",
       "disk.c",
       "return how == TRY ? write_try(d, buf, len, off) : write_at(d->fd, buf, len, off);",
       "if (len > 4096)\n\t\tlen -= len % 512;\n"
       "\treturn how == TRY ? write_try(d, buf, len, off) : write_at(d->fd, buf, len, off);",
       tests="test_model.py::test_random_operations_agree_with_a_model")
mutant("now and then a request fails", "oracle that ignores errors",
       "proto.c", "if (r->len > size || r->off > size - r->len)\n",
       "if (r->cookie % 100 == 99)\n\t\treturn EIO;\n"
       "\tif (r->len > size || r->off > size - r->len)\n",
       tests="test_model.py::test_random_operations_agree_with_a_model")

# Stable storage that fails

MAPPED = """
		uint8_t *mapped = mmap(NULL, b->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
				       b->fd, (off_t)(HEADER_SIZE + b->map_bytes));

		for (uint64_t i = 0; i < b->map_bytes; i++)
			if (b->live[i])
				mapped[i] = b->live[i];
		munmap((void *)b->live, b->map_bytes);
		b->live = (void *)mapped;
"""
OPENED = "if (prepare_file(b, clear))\n\t\treturn b;"

mutant("an export goes on after an error of stable storage",
       "an error of writeback is told once, and zeros are served and committed",
       "layer.c", "layer_fail(l, err);\n\t\treturn err;", "return err;",
       tests="test_durability.py::test_error_of_stable_storage_ends_an_export_that_has_a_map")
mutant("an error is told to who met it",
       "the old committer eats the error of writeback, and FLUSH after a switch says 0",
       "layer.c", "layer_fail(l, err);\n\t\treturn err;", "return err;",
       "disk.c", "\twhile (!d->error && fdatasync(d->fd) < 0)\n\t\tif (errno != EINTR)\n"
       "\t\t\td->error = -errno;\n\tpthread_mutex_unlock(&d->syncing);\n\treturn d->error;\n}\n\n"
       "int disk_check",
       "\tint err = 0;\n\n\twhile (!err && fdatasync(d->fd) < 0)\n\t\tif (errno != EINTR)\n"
       "\t\t\terr = -errno;\n\tpthread_mutex_unlock(&d->syncing);\n\treturn err;\n}\n\n"
       "int disk_check",
       tests="test_durability.py::"
             "test_error_of_a_commit_that_was_due_before_a_switch_is_told_after_it")
mutant("the sync of the map is not looked at",
       "a page of the map that cannot be written back is dropped, and its bits are lost",
       "bitmap.c", "atomic_store(&b->failed, true);\n\t\t\treturn -errno;", "return 0;",
       tests="test_durability.py::test_writeback_that_fails_below_the_map")
mutant("the live map is a mapping without room", "full disk under the bitmap file: SIGBUS",
       "bitmap.c", OPENED, "if (prepare_file(b, clear)) {" + MAPPED + "\t\treturn b;\n\t}",
       "bitmap.c", "\tif (!(atomic_load(&b->page[page]) & TAKEN)) {",
       "\tif (b->fd >= 0) {\n\t\tset_bits(b, blk, end);\n"
       "\t\tatomic_fetch_or(&b->page[page], DIRTY);\n\t\treturn 0;\n\t}\n"
       "\tif (!(atomic_load(&b->page[page]) & TAKEN)) {",
       tests="test_durability.py::test_full_file_system_under_the_map_is_enospc_of_a_write")
mutant("the live map is a mapping", "the file of a mapping is truncated: SIGBUS",
       "bitmap.c", OPENED, "if (prepare_file(b, clear)) {" + MAPPED + "\t\treturn b;\n\t}",
       tests="test_durability.py::test_map_that_others_truncate_harms_no_client")
mutant("a commit that fails is due again at the end", "SIGTERM with a full disk",
       "worker.c", "if (!pool.stop) {", "if (true) {",
       tests="test_faults.py::test_full_disk_does_not_keep_the_server_from_ending")
mutant("a file system is known by the boot id",
       "the file system dies and is mounted again without a reboot: the live map is believed",
       "bitmap.c", "return a == 0 || b == 0 || a == b;", "(void)a, (void)b;\n\treturn true;",
       tests="test_durability.py::"
             "test_file_system_that_is_mounted_again_has_no_block_that_nobody_wrote")
mutant("a file is created where it will be, and then filled",
       "--create killed in the middle leaves an empty image, which is served then",
       "util.c", "fd = mkostemp(tmp, O_CLOEXEC);",
       "fd = open(path, O_RDWR | O_CREAT | (replace ? 0 : O_EXCL) | O_CLOEXEC, 0600);",
       "util.c", "err = name_file(tmp, path, replace);", "(void)name_file;",
       tests="test_durability.py::test_kill_in_create_leaves_no_image_of_another_size")

# A stop

mutant("what has been received is dropped at the end", "SIGTERM answers with an error",
       "conn.c", "if (c->state < CONN_REQUEST)\n\t\tconn_kill(c, \"server stops\");",
       "conn_kill(c, \"server stops\");",
       tests="test_restart.py::test_requests_that_were_received_are_answered")
mutant("who waits for the origin gets an error at the end", "SIGTERM answers with an error",
       "conn.c", "if (r->error == ECANCELED) {", "if (false) {",
       tests="test_restart.py::test_what_waits_for_the_origin_gets_no_answer_and_can_be_repeated")
mutant("late requests get ESHUTDOWN",
       "a restart is an I/O error of a client that reconnects",
       "conn.c", "error = proto_check_request(&c->session, &h);",
       "error = c->stopping ? ESHUTDOWN : proto_check_request(&c->session, &h);",
       "conn.c", "return c->state < CONN_FINISHING && !c->backlog && !c->stream && "
       "!is_full(c) &&\n\t       (c->blocked || !c->stopping);",
       "return c->state < CONN_FINISHING && !c->backlog && !c->stream && !is_full(c);",
       "conn.c", "if (!c->gone && !c->stopping) {", "if (!c->gone) {",
       tests="test_restart.py::test_client_of_qemu_does_not_notice_restarts "
             "test_restart.py::test_client_that_goes_on_asking_loses_nothing")
mutant("the status forgets stable storage", "exit status 0 though something is lost",
       "layer.c", "err = atomic_load(&l->lost) ? -EIO : err;", "",
       tests="test_restart.py::test_flush_that_failed_is_told_by_the_status")
mutant("a disk that keeps a thread is no loss", "exit status 0 though something is lost",
       "xnbd.c", "remove_pidfile();\n\t\t\tend_at_once(NULL);",
       "remove_pidfile();\n\t\t\t_exit(EXIT_SUCCESS);",
       tests="test_restart.py::test_disk_that_keeps_a_thread_is_told_by_the_status")
mutant("what waits for the origin is not given up", "SIGTERM waits for a silent origin",
       "xnbd.c", "\t\t\torigin_cancel(exports.cache->origin);", "\t\t\t;",
       "conn.c", "STOPPING_MS = 2500,", "STOPPING_MS = 25000,",
       tests="test_order.py::test_server_ends_soon_though_requests_wait_for_the_origin")

# Replies in pieces

mutant("replies wait for the next event", "a reply stays behind a READ in pieces",
       "conn.c", "for (;;) {\n\t\tstruct request *r;\n\n\t\tif (c->stream)\n"
       "\t\t\tgo_on_with_stream(c);\n",
       "for (bool first = true;; first = false) {\n\t\tstruct request *r;\n\n\t\tif (c->stream) {\n"
       "\t\t\tif (first)\n\t\t\t\tgo_on_with_stream(c);\n\t\t\treturn;\n\t\t}\n",
       tests="test_protocol.py::test_small_read_beside_one_in_pieces_is_answered")

# Those who say nothing

mutant("the log may be an image", "a file that was named by mistake is overwritten",
       "xnbd.c", "if (!is_no_image(o->logpath))", "if (false)",
       tests="test_service.py::test_log_and_pidfile_are_not_what_else_is_there")
mutant("what was being made stays", "a start that is stopped leaves what it was making",
       "util.c", "if (unfinished)\n\t\tunlink(unfinished);", "",
       tests="test_silence.py::test_file_that_was_being_made_goes_with_the_start")
mutant("nobody is parked", "many who are silent slow down who works",
       "clients.c", "(t->loop.count > FEW_CONNS && !park(t, c))", "false",
       tests="test_silence.py::test_silent_clients_are_served_when_they_speak")
mutant("patience does not grow", "a client that speaks now and then changes threads each time",
       "clients.c", "\t\tc->patience *= 2;", "\t\t;",
       tests="test_silence.py::test_client_that_comes_back_soon_is_not_parked_again_and_again")
mutant("who is parked does not come back", "a request is lost while its client is parked, or comes back",
       "clients.c", "\tmove_client(t, c, least_loaded());\n}", "}",
       tests="test_silence.py::test_silent_clients_are_served_when_they_speak")
mutant("who was away for a moment is gone", "a host that is away for a moment loses its connections",
       "conn.c", "tcp.tcpi_last_ack_recv / 1000 >= seconds;", "tcp.tcpi_last_ack_recv / 1000 >= 3;",
       tests="test_silence.py::test_clients_whose_host_was_away_for_a_moment_stay")
mutant("hosts are not asked", "a host that vanished keeps its connections",
       "conn.c", "*owes |= tcp.tcpi_unacked > 0;", "return *owes = false;",
       tests="test_silence.py::test_clients_whose_host_is_gone_are_noticed")
mutant("a host that answers is gone, too", "a paused machine loses its disk",
       "conn.c", "tcp.tcpi_retransmits + tcp.tcpi_probes >= 2 &&", "c->backlog &&",
       tests="test_silence.py::test_client_that_takes_nothing_for_long_stays")
mutant("a host may have all connections", "one host takes all connections",
       "access.c", "there >= per_host_max", "false",
       tests="test_access.py::test_one_connection_of_a_host_too_many_is_closed")
mutant("a signal waits for the end of the start", "a start that waits for a silent origin cannot be ended",
       "xnbd.c", "if (stops && opening) {", "if (false) {",
       tests="test_silence.py::test_signal_ends_a_start_that_waits")
mutant("workers write for half a second from the beginning of a slow write",
       "a disk whose writes are slow holds up another export",
       "disk.c", "start + SLOW_WRITE_PENALTIES * took,", "start + 500 * 1000,",
       tests="test_order.py::test_write_after_a_slow_one_is_work_for_a_worker")
mutant("what a failed cache holds is a copy", "a copy into a cache that has failed",
       "copy.c", "c->status.error = EIO;\t\t/* what", ";\t\t/* what",
       tests="test_faults.py::test_copy_into_a_cache_that_has_failed_is_no_success")
mutant("the last commit has no end", "a disk that hangs",
       "xnbd.c", "\tserver_stop();\n\tif (!exports_close())", "\tserver_stop();\n\talarm(0);\n\tif (!exports_close())",
       tests="test_faults.py::test_last_commit_that_does_not_end_does_not_keep_the_server_from_ending")
mutant("the alarm says nothing", "a server ends with status 1, and nobody knows why",
       "xnbd.c", 'end_at_once("xnbd-server: stopped, but the main thread waits for the disk\\n");', "end_at_once(NULL);",
       tests="test_silence.py::test_end_by_the_alarm_is_told")
mutant("pieces are read for a client whatever others have", "16 MiB of memory, and clients that want more",
       "conn.c", "c->stream->at.len > 0 && !has_data_enough(c)",
       "c->stream->at.len > 0 && c->buffered + READ_PIECE <= BUFFERED_MAX",
       tests="test_silence.py::test_16_mib_suffice")

# Clients that vanish, changes that overlap

mutant("FAST_ZERO is refused in its middle", "FAST_ZERO fails when a part has been zeroed",
       "backend.c", "r->h.flags &= (uint16_t)~NBD_CMD_FLAG_FAST_ZERO;", ";",
       tests="test_order.py::test_fast_zero_that_newer_writes_cut_is_all_or_nothing")
mutant("a change takes nothing from older ones",
       "a write of a client that is gone lands over a newer one",
       "order.c", "\t\ttake(i, len, off);\n", "\t\t(void)len, (void)off;\n",
       tests="test_order.py::test_newer_change_outlives_one_that_the_disk_held_up_on_a_worker "
             "test_order.py::test_newer_writes_outlive_those_that_waited_for_the_origin")
mutant("a change gives up its place when it is durable",
       "a FUA write holds up others until it is durable",
       "backend.c", "return go_on_with_change(r, how);",
       "return how == TRY && r->h.flags & NBD_CMD_FLAG_FUA ? -EAGAIN : go_on_with_change(r, how);",
       "backend.c", "else if (ret != -EAGAIN)\n\t\torder_remove(&r->change);",
       "else if (ret != -EAGAIN && !(r->h.flags & NBD_CMD_FLAG_FUA))\n"
       "\t\torder_remove(&r->change);",
       "backend.c", "order_remove(&r->change);\n\tif (error == 0)\n"
       "\t\terror = request_commit(r);\n\tif (error == PENDING)\n\t\treturn;",
       "if (error == 0)\n\t\terror = request_commit(r);\n\tif (error == PENDING)\n\t\treturn;\n"
       "\torder_remove(&r->change);",
       "order.c", "\tc->active.len = 0;\n\tif (done)\n", "\tif (!done)\n\t\tc->active.len = 0;\n"
       "\tif (done)\n",
       tests="test_order.py::test_write_does_not_wait_for_the_sync_of_an_older_one")
mutant("a payload has all of its range while it comes",
       "a write waits for a payload that does not come",
       "order.h", "void order_init(struct order *o);",
       "extern _Thread_local struct change *order_own;\nvoid order_init(struct order *o);",
       "order.c", "void order_destroy(struct order *o)",
       "_Thread_local struct change *order_own;\n\nvoid order_destroy(struct order *o)",
       "order.c", "if (shares_block(c->active.off, ", "if (c != order_own && shares_block(c->active.off, ",
       "conn.c", "c->current = r;\n",
       "c->current = r;\n\tif (!r->error)\n"
       "\t\torder_hold(r->backend->order, &r->change, r->h.len, r->h.off, false);\n",
       "conn.c", "n = piece_size(c, n);\n\tif (n == 0)\n\t\treturn 0;",
       "n = piece_size(c, n);\n\tif (n == 0)\n\t\treturn 0;\n\torder_own = &r->change;\n"
       "\tif (n == r->at.len)\n\t\torder_remove(&r->change);",
       "conn.c", "if (size == 0)\n\t\treturn 0;",
       "order_own = NULL;\n\tif (size == 0)\n\t\treturn 0;",
       tests="test_order.py::test_write_does_not_wait_for_the_payload_of_an_older_one")
mutant("a change does not wait for one that is being stored",
       "a write that was repeated on another connection lands over a newer one",
       "order.c", "if (shares_block(c->active.off, ", "if (false && shares_block(c->active.off, ",
       tests="test_order.py::test_write_that_was_repeated_elsewhere_does_not_come_back")
mutant("a write that is done at once has no place in the order",
       "a write of a client that is gone lands over a newer one",
       "backend.c", "-EIO : order_begin(b->order, &change, len, false, &part);", "-EIO : (int)part.len / (int)len;",
       "backend.c", "\t\torder_end(&change, ret == 0, ret == 0);\n", "",
       tests="test_order.py::test_newer_writes_outlive_those_that_waited_for_the_origin")
mutant("a hole in a change is not kept", "zeroing of a client that is gone destroys what is newer",
       "order.c", "struct span s = c->left[i], rest[2];\n",
       "struct span s = c->left[i], rest[2];\n\n\t\tif (s.off < off && s.off + s.len > end)\n"
       "\t\t\treturn;\n",
       tests="test_order.py::test_newer_writes_outlive_a_long_zeroing")
mutant("a zeroing is one step", "one client's long zeroing holds up the misses of all others",
       "backend.h", "STEP_BYTES_MAX = 64 * 1024 * 1024,", "STEP_BYTES_MAX = 0x7ffff000,",
       tests="test_order.py::test_misses_do_not_wait_for_a_long_zeroing")
mutant("a change waits for older ones that have not begun",
       "a write of a whole block waits for an older one",
       "order.c", "if (older->count >= SPANS_MAX && has_left(older, len, off))",
       "if (has_left(older, len, off))",
       tests="test_order.py::test_write_of_a_whole_block_does_not_wait_for_a_silent_origin")
mutant("a change that a newer one touches is done",
       "a write that waits for the origin loses what a newer one has left of it",
       "order.c", "\t\ttake(i, len, off);\n", "\t\tif (has_left(i, len, off))\n\t\t\ti->count = 0;\n",
       tests="test_order.py::test_write_keeps_its_other_blocks_when_one_was_written_anew")
mutant("who closes its side is gone, whatever it has said", "what was sent before DISC is lost",
       "conn.c", "c->orderly = receive_rest(c) && has_disc(c);",
       "c->orderly = receive_rest(c) && has_disc(c) && false;",
       tests="test_order.py::test_what_was_sent_before_disc_is_carried_out")
mutant("what a client that is gone asked for is not taken back",
       "clients that gave up keep their places while the origin is silent",
       "conn.c", "\t\tc->backlog = NULL;\n\t}\n\ttake_all_back(c);",
       "\t\tc->backlog = NULL;\n\t}\n\t(void)take_all_back;",
       tests="test_order.py::test_clients_that_gave_up_give_back_all_at_once")
mutant("a client stays until it is answered",
       "a client that left keeps its place until the origin answers",
       "conn.c", "if (c->state != CONN_REQUEST || c->orderly)\n\t\treturn;",
       "if (c->state != CONN_REQUEST || c->orderly || c->in_flight > 0)\n\t\treturn;",
       "conn.c", "} while ((c->gone && !c->orderly && c->state == CONN_REQUEST) ||",
       "} while ((c->gone && !c->orderly && c->state == CONN_REQUEST && c->in_flight == 0) ||",
       tests="test_order.py::test_end_of_a_client_is_noticed_while_it_waits")
mutant("the switch waits for changes that wait for the origin",
       "what waits for the origin holds up the switch, or a snapshot after it",
       "order.c", "bool order_hold(",
       "static bool is_left(const struct change *c, uint64_t len, uint64_t off)\n{\n"
       "\tfor (; c; c = c->next)\n\t\tif (has_left(c, len, off))\n\t\t\treturn true;\n"
       "\treturn false;\n}\n\nbool order_hold(",
       "order.c", "!io_is_under_way(c->next, len, off)) && wait",
       "!io_is_under_way(c->next, len, off) && !is_left(c->next, len, off)) && wait",
       tests="test_order.py::test_nothing_holds_up_a_forced_switch_or_a_snapshot_after_it")


# The runner

def misfits(one, root=ROOT):
    """What is wrong with its changes: each must fit exactly once."""
    counts = {(name, old): (root / name).read_text().count(old) for name, old, _ in one.changes}
    return [f"{name} has {count} times the old text {old!r}"
            for (name, old), count in counts.items() if count != 1]


def change(tree, one):
    for name, old, new in one.changes:
        path = tree / name
        path.write_text(path.read_text().replace(old, new))


def build(tree):
    """What make complains about, if it fails."""
    made = subprocess.run(["make", "-s", "-C", tree, "all"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [f"it does not build:\n{made.stdout}"] if made.returncode else []


def copy_sources(tree):
    tree.mkdir()
    for pattern in ("*.[ch]", "Makefile", "README.md", "man", "tests"):
        for source in ROOT.glob(pattern):
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, tree / source.name)


def first_failure(tree, tests, *options):
    """The first test that fails with the programs of that tree, or None."""
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="t") as temporary:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no",
             f"--basetemp={temporary}/t", *options, *tests],
            cwd=tree.parent / "base" / "tests", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=PATIENCE,
            env={**os.environ, "XNBD_SERVER": str(tree / "xnbd-server"),
                 "XNBD_BGCTL": str(tree / "xnbd-bgctl"), "PYTHONDONTWRITEBYTECODE": "1"})
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.M)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not found):
        raise RuntimeError(f"pytest itself failed:\n{done.stdout}")
    return found[1] if found else None


def catch(tree, one, named_only):
    """The test that notices the mutant, or None."""
    found = first_failure(tree, one.tests)
    if not found and not named_only:
        found = first_failure(tree, ["."], *(f"--ignore={name}" for name in VIRTUAL_MACHINES))
    return found


def attempt(base, number, one, named_only):
    """Returns (whether it was caught, a line about it)."""
    tree, start = base.with_name(f"m{number}"), time.monotonic()
    shutil.copytree(base, tree, ignore=shutil.ignore_patterns("tests"))
    wrong = misfits(one, tree)
    if not wrong:
        change(tree, one)
        wrong = build(tree)
    if wrong:
        return False, "\n".join([f"MISFIT    {one.name}", *wrong])
    found = catch(tree, one, named_only)
    shutil.rmtree(tree)
    said = f"{time.monotonic() - start:4.0f} s  {one.name}"
    if not found:
        return False, f"SURVIVES  {said}"
    if first_failure(base, [found]):
        return False, f"UNSURE    {said}: {found} fails without it, too"
    return True, f"caught    {said}: {found}"


def run(mutants, jobs, named_only):
    not_caught = 0
    with tempfile.TemporaryDirectory(prefix="xm-") as scratch:
        base = Path(scratch) / "base"
        copy_sources(base)
        wrong = build(base)
        if wrong:
            sys.exit(wrong[0])
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(attempt, base, number, one, named_only)
                       for number, one in enumerate(mutants)]
            for future in concurrent.futures.as_completed(futures):
                caught, line = future.result()
                not_caught += not caught
                print(line, flush=True)
    print(f"{len(mutants)} mutants, {not_caught} not caught")
    return 1 if not_caught else 0


def selected(only):
    return [one for one in MUTANTS if not only or any(
        only in text for text in (one.name, one.hazard, *(c[0] for c in one.changes)))]


def show(mutants):
    for one in mutants:
        files = ", ".join(sorted({name for name, _, _ in one.changes}))
        print(f"{one.hazard}: {one.name} ({files})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="mutants with it in name, file or hazard")
    parser.add_argument("--list", action="store_true", help="show them, and do nothing")
    parser.add_argument("--jobs", type=int, default=2, help="at the same time (2)")
    parser.add_argument("--named", action="store_true", help="run no tests but those named")
    options = parser.parse_args()
    mutants = selected(options.only)
    if not mutants:
        sys.exit(f"no mutant has '{options.only}' in it")
    if options.list:
        return show(mutants)
    # In the background of a shell it is ignored, and would be by all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(mutants, options.jobs, options.named)


if __name__ == "__main__":
    sys.exit(main())
