/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * For QEMU this is no migration: none of its migration capabilities or parameters is changed, and
 * `cont` lets the guest run again at once. `xen-save-devices-state` writes QEMU's migration stream
 * without RAM. The stream lacks two parts that the destination's QEMU expects, and that are added
 * here: the configuration section behind the head (the machine type), and an empty description of
 * the stream behind its end.
 */
#include "guest/qemu-save.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest/json.h"
#include "guest/qemu-blocks.h"
#include "guest/qemu-facts.h"
#include "guest/qemu-private.h"
#include "guest/qemu-section.h"

/* QEMU's migration stream, migration/savevm.c */
#define STREAM_MAGIC	    0x5145564du /* "QEVM" */
#define STREAM_VERSION	    3u
#define STREAM_HEAD	    8 /* bytes */
#define STREAM_EOF	    0x00
#define SECTION_CONFIG	    0x07
#define SECTION_DESCRIPTION 0x06

#define CHUNK		    (256 * 1024)  /* bytes of QEMU's stream in a section */
#define STATE_MAX	    (1024u << 20) /* bytes; a larger state is a fault */

struct PrQemuSave {
	PrQmp *qmp;	      /* constant */
	PrAgentClient *agent; /* constant */

	/* From here on: the caller's thread; there is one call at a time. */
	char *machine;	 /* as in -machine; NULL: not queried yet */
	GArray *blocks;	 /* PrQemuPrivateBlock; NULL: not described */
	int memory;	 /* of QEMU's process; -1: not open */
	int state_fd;	 /* the memfd that QEMU writes to; -1: not prepared */
	gint64 fdset_id; /* the set of descriptors in QEMU that has the memfd */
};

PrQemuSave *pr_qemu_save_new(PrQmp *qmp, PrAgentClient *agent)
{
	PrQemuSave *save = g_new0(PrQemuSave, 1);

	save->qmp = qmp;
	save->agent = agent;
	save->memory = save->state_fd = -1;
	return save;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void pr_qemu_save_free(PrQemuSave *save)
{
	close_fd(&save->state_fd);
	close_fd(&save->memory);
	g_clear_pointer(&save->blocks, g_array_unref);
	g_free(save->machine);
	g_free(save);
}

gboolean pr_qemu_save_describe(PrQemuSave *save, PrGuestSink sink, void *opaque, GError **error)
{
	g_autoptr(GByteArray) out = g_byte_array_new();
	g_autoptr(JsonObject) facts = NULL;
	g_autofree char *text = NULL;

	g_clear_pointer(&save->blocks, g_array_unref);
	save->blocks = pr_qemu_private_blocks(save->qmp, save->agent, error);
	facts = save->blocks ? pr_qemu_facts(save->qmp, save->blocks, error) : NULL;
	if (!facts)
		return FALSE;
	text = pr_qemu_facts_to_text(facts);
	if (strlen(text) > PR_QEMU_SECTION_MAX) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_UNSUPPORTED,
			    "the list of this QEMU's devices is too long (%" G_GSIZE_FORMAT
			    " KiB; at most %u can be compared)",
			    strlen(text) >> 10, PR_QEMU_SECTION_MAX >> 10);
		return FALSE;
	}
	pr_qemu_section_append(out, PR_QEMU_SECTION_FACTS, text, strlen(text));
	return sink(out->data, out->len, opaque, error);
}

gboolean pr_qemu_save_early(PrQemuSave *save, PrGuestSink sink, void *opaque, GError **error)
{
	g_return_val_if_fail(save->blocks, FALSE);
	close_fd(&save->memory);
	save->memory = pr_agent_client_memory(save->agent, error);
	return save->memory >= 0 &&
	       pr_qemu_private_send(save->blocks, save->memory, sink, opaque, error);
}

/* QEMU duplicates a descriptor of a set whose access mode is the one that it opens with. It opens
 * for writing only. */
static int open_for_writing(int memfd)
{
	g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", memfd);

	return open(path, O_WRONLY | O_CLOEXEC);
}

static gboolean give_to_qemu(PrQemuSave *save, int fd, GError **error)
{
	g_autoptr(JsonNode) node = pr_qmp_execute(save->qmp, "add-fd", NULL, fd, error);

	if (!node)
		return FALSE;
	if (!JSON_NODE_HOLDS_OBJECT(node) ||
	    !json_object_has_member(json_node_get_object(node), "fdset-id")) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "QEMU's answer to 'add-fd' names no set of descriptors");
		return FALSE;
	}
	save->fdset_id = pr_json_int(json_node_get_object(node), "fdset-id");
	return TRUE;
}

gboolean pr_qemu_save_prepare(PrQemuSave *save, GError **error)
{
	int writable;
	gboolean ok;

	if (save->state_fd >= 0)
		return TRUE;
	if (!save->machine)
		save->machine = pr_qemu_machine(save->qmp, error);
	if (!save->machine)
		return FALSE;
	save->state_fd = memfd_create("postroad-device-state", MFD_CLOEXEC);
	writable = save->state_fd >= 0 ? open_for_writing(save->state_fd) : -1;
	if (writable < 0) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "no file for the device state: %s", g_strerror(errno));
		close_fd(&save->state_fd);
		return FALSE;
	}
	ok = give_to_qemu(save, writable, error);
	close(writable);
	if (!ok)
		close_fd(&save->state_fd);
	return ok;
}

static gboolean write_state(PrQemuSave *save, GError **error)
{
	g_autofree char *path = g_strdup_printf("/dev/fdset/%" G_GINT64_FORMAT, save->fdset_id);
	JsonObject *arguments = json_object_new();

	json_object_set_string_member(arguments, "filename", path);
	if (pr_qmp_command(save->qmp, "xen-save-devices-state", arguments, -1, error))
		return TRUE;
	g_prefix_error(error, "QEMU could not save its device state: ");
	return FALSE;
}

static gboolean refuse_state(gsize len, GError **error)
{
	g_set_error(
		error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
		"the device state that QEMU has saved is not a migration stream (%" G_GSIZE_FORMAT
		" bytes)",
		len);
	return FALSE;
}

static gboolean check_state(const uint8_t *state, gsize len, GError **error)
{
	guint32 head[2];

	if (len <= STREAM_HEAD)
		return refuse_state(len, error);
	memcpy(head, state, sizeof(head));
	if (GUINT32_FROM_BE(head[0]) == STREAM_MAGIC &&
	    GUINT32_FROM_BE(head[1]) == STREAM_VERSION && state[len - 1] == STREAM_EOF)
		return TRUE;
	return refuse_state(len, error);
}

/* Adds the two parts that the stream lacks. */
static GByteArray *complete_stream(PrQemuSave *save, const uint8_t *state, gsize len)
{
	static const uint8_t description[] = {SECTION_DESCRIPTION, 0, 0, 0, 2, '{', '}'};
	GByteArray *stream = g_byte_array_sized_new((guint)len + 512);
	guint32 name_len = GUINT32_TO_BE((guint32)strlen(save->machine));
	const uint8_t config = SECTION_CONFIG;

	g_byte_array_append(stream, state, STREAM_HEAD);
	if (state[STREAM_HEAD] != SECTION_CONFIG) {
		g_byte_array_append(stream, &config, 1);
		g_byte_array_append(stream, (const guint8 *)&name_len, sizeof(name_len));
		g_byte_array_append(stream, (const guint8 *)save->machine, strlen(save->machine));
	}
	g_byte_array_append(stream, state + STREAM_HEAD, len - STREAM_HEAD);
	g_byte_array_append(stream, description, sizeof(description));
	return stream;
}

static GByteArray *read_state(PrQemuSave *save, GError **error)
{
	off_t len = lseek(save->state_fd, 0, SEEK_END);
	GByteArray *stream = NULL;
	void *state;

	if (len <= 0 || len > STATE_MAX) {
		refuse_state(MAX(len, 0), error);
		return NULL;
	}
	state = mmap(NULL, len, PROT_READ, MAP_PRIVATE, save->state_fd, 0);
	if (state == MAP_FAILED) {
		g_set_error(error, PR_GUEST_ERROR, PR_GUEST_ERROR_PROTOCOL,
			    "the device state cannot be read: %s", g_strerror(errno));
		return NULL;
	}
	if (check_state(state, len, error))
		stream = complete_stream(save, state, len);
	munmap(state, len);
	return stream;
}

static gboolean send_stream(const GByteArray *stream, GCancellable *cancel, PrGuestSink sink,
			    void *opaque, GError **error)
{
	for (gsize at = 0; at < stream->len; at += CHUNK) {
		g_autoptr(GByteArray) out = g_byte_array_new();

		pr_qemu_section_append(out, PR_QEMU_SECTION_STATE, stream->data + at,
				       MIN(CHUNK, stream->len - at));
		if (g_cancellable_set_error_if_cancelled(cancel, error) ||
		    !sink(out->data, out->len, opaque, error))
			return FALSE;
	}
	return TRUE;
}

gboolean pr_qemu_save_state(PrQemuSave *save, GCancellable *cancel, PrGuestSink sink, void *opaque,
			    GError **error)
{
	g_autoptr(GByteArray) stream = NULL;

	if (!pr_qemu_save_prepare(save, error) ||
	    g_cancellable_set_error_if_cancelled(cancel, error) || !write_state(save, error))
		return FALSE;
	if (save->memory >= 0 &&
	    !pr_qemu_private_send(save->blocks, save->memory, sink, opaque, error))
		return FALSE;
	close_fd(&save->memory);
	stream = read_state(save, error);
	return stream && send_stream(stream, cancel, sink, opaque, error);
}

void pr_qemu_save_end(PrQemuSave *save)
{
	g_autoptr(GError) error = NULL;
	JsonObject *arguments;

	close_fd(&save->memory);
	if (save->state_fd < 0)
		return;
	close_fd(&save->state_fd);
	arguments = json_object_new();
	json_object_set_int_member(arguments, "fdset-id", save->fdset_id);
	if (!pr_qmp_command(save->qmp, "remove-fd", arguments, -1, &error))
		g_debug("%s", error->message);
}
