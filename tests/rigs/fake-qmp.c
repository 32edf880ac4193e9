/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/rigs/fake-qmp.h"

#include <errno.h>
#include <glib/gstdio.h>
#include <json-glib/json-glib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define GREETING                                                                                   \
	"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0, \"minor\": 2, \"major\": 7}, "          \
	"\"package\": \"\"}, \"capabilities\": [\"oob\"]}}\r\n"

struct FakeQmp {
	char *dir;	/* constant */
	char *path;	/* constant */
	char *greeting; /* constant */
	int listen_fd;	/* constant */
	GThread *thread;

	GMutex lock;
	GCond cond;	     /* lock; conn */
	GHashTable *answers; /* lock; key -> answer */
	GHashTable *counts;  /* lock; key -> count */
	GHashTable *args;    /* lock; key -> arguments as JSON */
	int conn;	     /* lock; -1: no client yet; closed by fake_qmp_free() */
	int last_fd;	     /* lock */
	GBytes *state;	     /* lock; or NULL */
	gint64 delayed;	     /* the thread's; id of the command with FAKE_HOLD, or 0 */
};

static void send_text(int conn, const char *text)
{
	for (gsize len = strlen(text); len > 0;) {
		ssize_t n = send(conn, text, len, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return;
		text += n;
		len -= n;
	}
}

static void send_return(FakeQmp *fake, gint64 id, const char *json)
{
	g_autofree char *text =
		g_strdup_printf("{\"return\": %s, \"id\": %" G_GINT64_FORMAT "}\r\n", json, id);

	send_text(fake->conn, text);
}

static void send_error(FakeQmp *fake, gint64 id, const char *class, const char *desc)
{
	g_autofree char *text = g_strdup_printf("{\"error\": {\"class\": \"%s\", \"desc\": \"%s\"},"
						" \"id\": %" G_GINT64_FORMAT "}\r\n",
						class, desc, id);

	send_text(fake->conn, text);
}

static char *key_of(JsonObject *command)
{
	static const char *const names[] = {"path", "property", "command-line", NULL};
	GString *key =
		g_string_new(json_object_get_string_member_with_default(command, "execute", ""));
	JsonObject *arguments = json_object_has_member(command, "arguments")
					? json_object_get_object_member(command, "arguments")
					: NULL;

	for (guint i = 0; arguments && names[i]; i++) {
		if (json_object_has_member(arguments, names[i]))
			g_string_append_printf(key, " %s",
					       json_object_get_string_member(arguments, names[i]));
	}
	return g_string_free(key, FALSE);
}

static void store_arguments(FakeQmp *fake, const char *key, JsonObject *command)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);

	if (json_object_has_member(command, "arguments"))
		g_hash_table_insert(fake->args, g_strdup(key),
				    json_to_string(json_object_get_member(command, "arguments"),
						   FALSE));
}

static char *look_up(FakeQmp *fake, const char *key)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);
	guint count = GPOINTER_TO_UINT(g_hash_table_lookup(fake->counts, key));

	g_hash_table_insert(fake->counts, g_strdup(key), GUINT_TO_POINTER(count + 1));
	return g_strdup(g_hash_table_lookup(fake->answers, key));
}

/* Returns FALSE to close the connection. */
static gboolean answer(FakeQmp *fake, gint64 id, const char *text)
{
	if (!text)
		send_error(fake, id, "CommandNotFound", "no such command");
	else if (g_str_equal(text, FAKE_CLOSE))
		return FALSE;
	else if (g_str_has_prefix(text, FAKE_RAW))
		send_text(fake->conn, text + strlen(FAKE_RAW));
	else if (g_str_has_prefix(text, FAKE_ERROR))
		send_error(fake, id, "GenericError", text + strlen(FAKE_ERROR));
	else if (!g_str_equal(text, FAKE_SILENCE))
		send_return(fake, id, text);
	return TRUE;
}

/* QEMU writes the state before it answers. */
static void save_state(FakeQmp *fake)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);
	const char *bytes;
	gsize len;

	if (!fake->state)
		return;
	bytes = g_bytes_get_data(fake->state, &len);
	if (write(fake->last_fd, bytes, len) != (gssize)len)
		g_error("fake-qmp: the state cannot be written: %s", g_strerror(errno));
}

static gboolean serve_command(FakeQmp *fake, const char *line)
{
	g_autoptr(JsonNode) node = json_from_string(line, NULL);
	JsonObject *command = json_node_get_object(node);
	gint64 id = json_object_get_int_member(command, "id");
	g_autofree char *key = key_of(command);
	g_autofree char *text = NULL;

	store_arguments(fake, key, command);
	text = look_up(fake, key);
	if (g_str_equal(key, "xen-save-devices-state"))
		save_state(fake);
	if (g_strcmp0(text, FAKE_HOLD) == 0) {
		fake->delayed = id;
		return TRUE;
	}
	if (!answer(fake, id, text))
		return FALSE;
	if (fake->delayed)
		send_return(fake, fake->delayed, "{}");
	fake->delayed = 0;
	return TRUE;
}

static ssize_t receive(FakeQmp *fake, char *bytes, gsize size)
{
	char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = {.iov_base = bytes, .iov_len = size};
	struct msghdr msg = {.msg_iov = &iov,
			     .msg_iovlen = 1,
			     .msg_control = control,
			     .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(fake->conn, &msg, MSG_CMSG_CLOEXEC);
	struct cmsghdr *cmsg = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;

	if (cmsg && cmsg->cmsg_type == SCM_RIGHTS) {
		g_mutex_lock(&fake->lock);
		if (fake->last_fd >= 0)
			close(fake->last_fd);
		memcpy(&fake->last_fd, CMSG_DATA(cmsg), sizeof(int));
		g_mutex_unlock(&fake->lock);
	}
	return n;
}

static void serve(FakeQmp *fake)
{
	g_autoptr(GString) pending = g_string_new(NULL);
	char bytes[4096];
	ssize_t n;

	send_text(fake->conn, fake->greeting);
	while ((n = receive(fake, bytes, sizeof(bytes))) > 0) {
		char *end;

		g_string_append_len(pending, bytes, n);
		while ((end = strchr(pending->str, '\n'))) {
			g_autofree char *line = g_strndup(pending->str, end - pending->str);

			g_string_erase(pending, 0, end - pending->str + 1);
			if (!serve_command(fake, line))
				return;
		}
	}
}

static gpointer server_thread(gpointer data)
{
	FakeQmp *fake = data;
	int conn = accept(fake->listen_fd, NULL, NULL);

	if (conn < 0)
		return NULL;
	g_mutex_lock(&fake->lock);
	fake->conn = conn;
	g_cond_broadcast(&fake->cond);
	g_mutex_unlock(&fake->lock);
	serve(fake);
	shutdown(conn, SHUT_RDWR);
	return NULL;
}

FakeQmp *fake_qmp_new(const char *greeting)
{
	FakeQmp *fake = g_new0(FakeQmp, 1);
	struct sockaddr_un addr = {.sun_family = AF_UNIX};

	fake->dir = g_dir_make_tmp("fake-qmp-XXXXXX", NULL);
	fake->path = g_build_filename(fake->dir, "qmp", NULL);
	fake->greeting = g_strdup(greeting ? greeting : GREETING);
	fake->answers = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
	fake->counts = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, NULL);
	fake->args = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
	fake->conn = -1;
	fake->last_fd = -1;
	g_mutex_init(&fake->lock);
	g_cond_init(&fake->cond);
	g_strlcpy(addr.sun_path, fake->path, sizeof(addr.sun_path));
	fake->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(fake->listen_fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ||
	    listen(fake->listen_fd, 4) < 0)
		g_error("fake-qmp: %s: %s", fake->path, g_strerror(errno));
	fake_qmp_set(fake, "qmp_capabilities", "{}");
	fake->thread = g_thread_new("fake-qmp", server_thread, fake);
	return fake;
}

void fake_qmp_free(FakeQmp *fake)
{
	shutdown(fake->listen_fd, SHUT_RDWR);
	g_thread_join(fake->thread);
	close(fake->listen_fd);
	if (fake->conn >= 0)
		close(fake->conn);
	if (fake->last_fd >= 0)
		close(fake->last_fd);
	g_clear_pointer(&fake->state, g_bytes_unref);
	g_unlink(fake->path);
	g_rmdir(fake->dir);
	g_hash_table_unref(fake->answers);
	g_hash_table_unref(fake->counts);
	g_hash_table_unref(fake->args);
	g_mutex_clear(&fake->lock);
	g_cond_clear(&fake->cond);
	g_free(fake->greeting);
	g_free(fake->path);
	g_free(fake->dir);
	g_free(fake);
}

const char *fake_qmp_path(FakeQmp *fake)
{
	return fake->path;
}

void fake_qmp_set(FakeQmp *fake, const char *key, const char *answer)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);

	g_hash_table_insert(fake->answers, g_strdup(key), g_strdup(answer));
}

void fake_qmp_send(FakeQmp *fake, const char *text)
{
	g_mutex_lock(&fake->lock);
	while (fake->conn < 0)
		g_cond_wait(&fake->cond, &fake->lock);
	g_mutex_unlock(&fake->lock);
	send_text(fake->conn, text);
}

void fake_qmp_set_state(FakeQmp *fake, const void *bytes, gsize len)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);

	g_clear_pointer(&fake->state, g_bytes_unref);
	fake->state = g_bytes_new(bytes, len);
}

guint fake_qmp_count(FakeQmp *fake, const char *key)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);

	return GPOINTER_TO_UINT(g_hash_table_lookup(fake->counts, key));
}

char *fake_qmp_arguments(FakeQmp *fake, const char *key)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);

	return g_strdup(g_hash_table_lookup(fake->args, key));
}

int fake_qmp_take_fd(FakeQmp *fake)
{
	g_autoptr(GMutexLocker) locker = g_mutex_locker_new(&fake->lock);
	int fd = fake->last_fd;

	fake->last_fd = -1;
	return fd;
}

void fake_qmp_set_healthy(FakeQmp *fake)
{
	static const char *const table[][2] = {
		{"query-version", "{\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 0}}"},
		{"query-status", "{\"status\": \"running\", \"running\": true}"},
		{"query-migrate", "{}"},
		{"query-migrate-capabilities", "[{\"capability\": \"events\", \"state\": false}, "
					       "{\"capability\": \"multifd\", \"state\": false}]"},
		{"query-named-block-nodes", "[{\"node-name\": \"disk0\"}]"},
		{"query-cpus-fast", "[{\"cpu-index\": 0, \"qom-path\": \"/cpu0\"}]"},
		{"qom-get /machine type", "\"pc-q35-7.2-machine\""},
		{"qom-get /cpu0 type", "\"max-x86_64-cpu\""},
		{"human-monitor-command info qtree", "\"\""},
		{"query-migrate-parameters", "{\"tls-creds\": \"\"}"},
		{"migrate-set-capabilities", "{}"},
		{"getfd", "{}"},
		{"add-fd", "{\"fdset-id\": 3, \"fd\": 30}"},
		{"remove-fd", "{}"},
		{"xen-save-devices-state", "{}"},
		{"migrate-incoming", "{}"},
		{"stop", "{}"},
		{"cont", "{}"},
		{"qom-list /machine/peripheral",
		 "[{\"name\": \"type\", \"type\": \"string\"}, "
		 "{\"name\": \"nic0\", \"type\": \"child<virtio-net-pci>\"}]"},
		{"qom-list /machine/peripheral-anon",
		 "[{\"name\": \"type\", \"type\": \"string\"}]"},
		{"qom-list /objects", "[{\"name\": \"type\", \"type\": \"string\"}, "
				      "{\"name\": \"mem\", \"type\": "
				      "\"child<memory-backend-memfd>\"}]"},
		{"qom-get /objects/mem share", "true"},
		{"qom-get /objects/mem size", "67108864"},
		{"human-monitor-command info network",
		 "\"nic0: index=0,type=nic\\r\\n \\\\ n0: index=0,type=tap\\r\\n\""},
		{"human-monitor-command info ramblock",
		 "\"              Block Name    PSize              Offset               Used     "
		 "         Total\\r\\n                     mem    4 KiB  0x0000000000000000 "
		 "0x0000000004000000 0x0000000004000000\\r\\n                 pc.bios    4 KiB  "
		 "0x0000000004000000 0x0000000000040000 0x0000000000040000\\r\\n\""},
		{"human-monitor-command info mtree -f", "\"\""},
	};

	for (guint i = 0; i < G_N_ELEMENTS(table); i++)
		fake_qmp_set(fake, table[i][0], table[i][1]);
}
