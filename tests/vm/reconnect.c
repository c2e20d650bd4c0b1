/*
 * reconnect: gives the kernel's NBD client a new connection in the place of one that is dead, or
 * the time that it waits for one.  Debian's nbd-client does neither.
 *
 *	reconnect /dev/nbdN SECONDS
 *	reconnect /dev/nbdN ADDRESS PORT
 *
 * The kernel says success also where no connection is dead; it leaves the new one alone then,
 * which ends with this program.  The exit status is 1 where anything failed.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <err.h>
#include <errno.h>
#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A message, which grows. */
struct message {
	struct nlmsghdr head;
	struct genlmsghdr genl;
	char data[1000];
};

static void begin(struct message *m, int family, int command)
{
	memset(m, 0, sizeof(*m));
	m->head.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN);
	m->head.nlmsg_type = (uint16_t)family;
	m->head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	m->genl.cmd = (uint8_t)command;
	m->genl.version = 1;
}

/* Begin an attribute; what is put until its end is in it. */
static struct nlattr *open_attribute(struct message *m, int type)
{
	struct nlattr *a = (struct nlattr *)((char *)m + NLMSG_ALIGN(m->head.nlmsg_len));

	a->nla_type = (uint16_t)type;
	m->head.nlmsg_len = NLMSG_ALIGN(m->head.nlmsg_len) + NLA_HDRLEN;
	return a;
}

static void close_attribute(struct message *m, struct nlattr *a)
{
	a->nla_len = (uint16_t)((char *)m + m->head.nlmsg_len - (char *)a);
}

static void put(struct message *m, int type, const void *data, size_t len)
{
	struct nlattr *a = open_attribute(m, type);

	memcpy((char *)a + NLA_HDRLEN, data, len);
	m->head.nlmsg_len += (uint32_t)len;
	close_attribute(m, a);
}

/* Send a message, and take the answer; exits where that is an error. */
static void ask(int fd, struct message *m, struct message *answer)
{
	if (send(fd, m, m->head.nlmsg_len, 0) < 0 || recv(fd, answer, sizeof(*answer), 0) < 0)
		err(1, "netlink");
	if (answer->head.nlmsg_type == NLMSG_ERROR) {
		int error;

		memcpy(&error, NLMSG_DATA(&answer->head), sizeof(error));
		if (error) {
			errno = -error;
			err(1, "the kernel refuses");
		}
	}
}

/* The number of the family of NBD's messages. */
static int find_family(int fd)
{
	struct message m, answer, ack;
	char *p, *end;

	begin(&m, GENL_ID_CTRL, CTRL_CMD_GETFAMILY);
	put(&m, CTRL_ATTR_FAMILY_NAME, NBD_GENL_FAMILY_NAME, sizeof(NBD_GENL_FAMILY_NAME));
	ask(fd, &m, &answer);
	recv(fd, &ack, sizeof(ack), 0);
	end = (char *)&answer + answer.head.nlmsg_len;
	for (p = answer.data; p < end;) {
		struct nlattr *a = (struct nlattr *)p;
		uint16_t id;

		memcpy(&id, p + NLA_HDRLEN, sizeof(id));
		if (a->nla_type == CTRL_ATTR_FAMILY_ID)
			return id;
		p += NLA_ALIGN(a->nla_len);
	}
	errx(1, "the kernel has no NBD");
}

static void receive(int fd, void *buf, size_t len)
{
	if (recv(fd, buf, len, MSG_WAITALL) != (ssize_t)len)
		errx(1, "the server is gone");
}

/* A connection to the default export, after its handshake. */
static int dial(const char *address, const char *port)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };
	struct { uint32_t flags; uint64_t magic; uint32_t option, length; }
		__attribute__((packed)) hello = {
		htobe32(3), htobe64(0x49484156454F5054), htobe32(1), 0
	};
	char greeting[18], export[10];
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (inet_pton(AF_INET, address, &in.sin_addr) != 1)
		errx(1, "no address: %s", address);
	if (fd < 0 || connect(fd, (struct sockaddr *)&in, sizeof(in)) < 0)
		err(1, "%s port %s", address, port);
	receive(fd, greeting, sizeof(greeting));
	if (send(fd, &hello, sizeof(hello), 0) != sizeof(hello))
		err(1, "cannot send");
	receive(fd, export, sizeof(export));
	return fd;
}

int main(int argc, char **argv)
{
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);
	struct nlattr *sockets, *item;
	struct message m, answer;
	uint32_t index, sock;
	uint64_t seconds;

	if (argc < 3 || strncmp(argv[1], "/dev/nbd", 8) != 0)
		errx(2, "usage: reconnect /dev/nbdN {SECONDS | ADDRESS PORT}");
	if (fd < 0)
		err(1, "netlink");
	index = (uint32_t)atoi(argv[1] + 8);
	begin(&m, find_family(fd), NBD_CMD_RECONFIGURE);
	put(&m, NBD_ATTR_INDEX, &index, sizeof(index));
	if (argc == 3) {
		seconds = strtoull(argv[2], NULL, 10);
		put(&m, NBD_ATTR_DEAD_CONN_TIMEOUT, &seconds, sizeof(seconds));
	} else {
		sock = (uint32_t)dial(argv[2], argv[3]);
		sockets = open_attribute(&m, NBD_ATTR_SOCKETS | NLA_F_NESTED);
		item = open_attribute(&m, NBD_SOCK_ITEM | NLA_F_NESTED);
		put(&m, NBD_SOCK_FD, &sock, sizeof(sock));
		close_attribute(&m, item);
		close_attribute(&m, sockets);
	}
	ask(fd, &m, &answer);
	return 0;
}
