/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The control channel's wire format: pure functions that encode and decode, no I/O, no state.
 * All decoding of what a peer sends is in wire.c, which is fuzzed.
 *
 * Frame: be16 type, be16 zero, be32 body length, body. Integers are big endian. A message that
 * QEMU has, too, has QEMU's name and number: the low byte of the type is QEMU's number, the high
 * byte the class. Its body is QEMU's payload unless it is listed here.
 *
 *	HELLO		be32 magic, be16 version, u8 role, uuid, be64 epoch, u8 resume, secret,
 *			be64 capabilities (the highest byte: lanes), u8 length + scheme,
 *			be32 n, n times (u8 length + idstr, be64 size, be32 page size)
 *	HELLO_ACK	be32 magic, be16 version, be32 status, be64 capabilities, be16 data port,
 *			PROGRESS, reason; the same in every version of the
 *			protocol, so that a refusal can always be read
 *	LANE		be32 magic, uuid, be64 epoch, token, u8 lane
 *	HEARTBEAT	be64 stamp, be64 echo, be64 age of the echo (PrHeartbeatBody)
 *	PAUSE, HOLD, ERROR
 *			reason: be16 length + UTF-8 text without control characters
 *	PACKAGED	u8 flags (1: last, 2: guest was running), be32 length, that many bytes
 *	RECV_BITMAP	(return path) u8 length + idstr, be64 size, bitmap, be64 end mark
 *	RECV_BITMAP_ZSTD
 *			the same with the bitmap as a zstd frame; the size is that
 *			before compression
 *	REQ_PAGES	be64 start, be32 length (0: a probe), be32 block
 *	RAM_ZERO	be32 block, be32 n, n times (be64 offset, be64 length)
 *	GRANT		be32 block, be32 n, n times (be64 offset, be64 length, be64 addr, be64 key)
 *	REQ_HASHES	as RAM_ZERO
 *	HASHES		be32 block, be64 offset, be32 n, n times be64: one for each
 *			page from the offset on
 *	PROGRESS	the five be64 of PrProgress in their order
 *	RAILS		be32 n, n times (be64 epoch, be64 bytes, u8 pulls)
 *	LOST		be64 epoch, u8 paused by the operator, reason
 *	ACTIVATE	be64 epoch, u8 resume
 *	ACTIVATED	as HELLO_ACK
 *	PROBED		be64 count, be64 round trip in microseconds
 *	SCAN_FIRST	as RAM_ZERO
 *
 *	source                                         destination
 *	  HELLO (uuid, epoch, secret, role, blocks) ──▶
 *	                                            ◀── HELLO_ACK (status, data port)
 *	  … data lanes are connected, bound by uuid, epoch, and a token made of the secret …
 *	  CMD_POSTCOPY_ADVISE, CMD_PING 1           ──▶
 *	                                            ◀── RP_PONG 1 (RAM is ready)
 *	  … the source's guest is stopped …
 *	  GRANT (what READ may touch)               ──▶
 *	  CMD_RAM_ZERO … (holes)                    ──▶
 *	  CMD_POSTCOPY_LISTEN                       ──▶
 *	  CMD_PACKAGED … (device state)             ──▶
 *	  CMD_PING 0x42                             ──▶
 *	                                            ◀── RP_PONG 0x42 (device state is loaded)
 *	  CMD_POSTCOPY_RUN                          ──▶
 *	  CMD_RAM_ZERO … (zero pages found later)   ──▶
 *	                                            ◀── RP_RAILS (with standbys), RP_PROGRESS …
 *	                                            ◀── RP_SHUT
 *
 * Over rdma: GRANT and RAM_ZERO may come at any time after LISTEN, also after RUN, until each
 * page was in one of them:
 *	                                            ◀── RP_SCAN_FIRST (a fault waits)
 *
 * Where pages are verified (capabilities of HELLO and HELLO_ACK), at any time after LISTEN:
 *	                                            ◀── RP_REQ_HASHES (of pages being read)
 *	  CMD_HASHES                                ──▶ for each of its ranges
 *
 * Recovery, on a new connection with a higher epoch:
 *	  HELLO, HELLO_ACK, lanes, GRANT as above
 *	  CMD_RECV_BITMAP per block                 ──▶
 *	                                            ◀── RP_RECV_BITMAP per block
 *	  CMD_POSTCOPY_RESUME                       ──▶
 *	                                            ◀── RP_RESUME_ACK
 *
 * A standby path is connected while another one is in use, and probed by the destination:
 *	  HELLO (resume: standby), HELLO_ACK, lanes, GRANT as above
 *	  CMD_PING 1                                ──▶ (READs may begin)
 *	                                            ◀── RP_PROBED, for each probe
 * When it is needed, ACTIVATE replaces the HELLO of a recovery, which then goes on with
 * RECV_BITMAP:
 *	  CMD_ACTIVATE (epoch)                      ──▶
 *	                                            ◀── RP_ACTIVATED
 * A side that loses the path in use tells its peer so over all standby paths: MSG_LOST.
 */
#pragma once

#include <glib.h>
#include <stdint.h>

#define PR_WIRE_MAGIC	     0x50535452u /* "PSTR" */
#define PR_WIRE_VERSION	     2
#define PR_WIRE_HEADER_BYTES 8
#define PR_UUID_BYTES	     16
#define PR_SECRET_BYTES	     16
#define PR_TOKEN_BYTES	     16
#define PR_IDSTR_MAX	     255
#define PR_BLOCKS_MAX	     64	  /* RAM blocks of one guest */
#define PR_RANGES_MAX	     4096 /* in one RAM_ZERO or GRANT message */
#define PR_HASHES_MAX	     256  /* in one HASHES message: pages of the longest READ */
#define PR_REASON_MAX	     1024
#define PR_PACKAGED_CHUNK    (1024 * 1024)
#define PR_PING_READY	     1
#define PR_PING_RUNNING	     2
#define PR_PING_TOLD	     3
#define PR_PING_EARLY	     4	  /* all of the early state was taken */
#define PR_PING_LOADED	     0x42 /* QEMU_VM_PING_PACKAGED_LOADED */
#define PR_RESUME_ACK_VALUE  1
#define PR_BITMAP_END_MARK   0x0123456789abcdefull

typedef enum PrMsgType {
	/* both ways, handled by the control channel itself */
	PR_MSG_HELLO = 0x0001,
	PR_MSG_HELLO_ACK = 0x0002,
	PR_MSG_LANE = 0x0003, /* first message of a data connection of tcp: */
	PR_MSG_LANE_ACK = 0x0004,
	PR_MSG_HEARTBEAT = 0x0005,
	/* both ways, for the engine */
	PR_MSG_PAUSE = 0x0010, /* reason: the sender has left this epoch */
	PR_MSG_HOLD = 0x0012,  /* as PAUSE, but the operator did it: no automatic recovery */
	PR_MSG_ERROR = 0x0011, /* reason: the sender gives this migration up (before RUN only) */
	PR_MSG_LOST = 0x0013,  /* the sender has left another connection, with this epoch */
	PR_MSG_NOTE = 0x0014,  /* reason: a text for the peer's operator only */
	/* source to destination: QEMU's MIG_CMD_* */
	PR_CMD_PING = 0x0102,
	PR_CMD_POSTCOPY_ADVISE = 0x0103,
	PR_CMD_POSTCOPY_LISTEN = 0x0104,
	PR_CMD_POSTCOPY_RUN = 0x0105,
	PR_CMD_PACKAGED = 0x0107,
	PR_CMD_POSTCOPY_RESUME = 0x0109,
	PR_CMD_RECV_BITMAP = 0x010a,
	PR_CMD_GRANT = 0x0180,
	PR_CMD_RAM_ZERO = 0x0181,
	PR_CMD_ACTIVATE = 0x0182, /* this standby path is in use from now on */
	PR_CMD_HASHES = 0x0183,	  /* of the pages of REQ_HASHES */
	/* state of the guest's kind that is sent while the guest still runs (guest.h, describe
	 * and save_early) */
	PR_CMD_EARLY_STATE = 0x0184,
	/* destination to source: QEMU's MIG_RP_MSG_* */
	PR_RP_SHUT = 0x0201,
	PR_RP_PONG = 0x0202,
	PR_RP_REQ_PAGES = 0x0204, /* on data connections of tcp: */
	PR_RP_RECV_BITMAP = 0x0205,
	PR_RP_RESUME_ACK = 0x0206,
	PR_RP_PROGRESS = 0x0280,
	PR_RP_PAGES = 0x0281, /* source to destination, on data connections of tcp: the answer */
	PR_RP_ACTIVATED = 0x0282,
	PR_RP_PROBED = 0x0283,		 /* a standby path's lanes have answered */
	PR_RP_RECV_BITMAP_ZSTD = 0x0284, /* RECV_BITMAP, the bitmap compressed */
	PR_RP_RAILS = 0x0285,		 /* how much the standby paths have carried */
	PR_RP_SCAN_FIRST =
		0x0286, /* ranges that faults wait for: the source is to scan them first */
	PR_RP_REQ_HASHES = 0x0287, /* asks for the hashes of pages */
} PrMsgType;

typedef enum PrWireError {
	PR_WIRE_ERROR_MALFORMED, /* a peer has broken the protocol; its connection is closed */
} PrWireError;
#define PR_WIRE_ERROR pr_wire_error_quark()
GQuark pr_wire_error_quark(void);

/* The name of a message type; of an unknown one "type 0x…" (in a static buffer of the thread). */
const char *pr_msg_name(uint16_t type);
gboolean pr_msg_is_known(uint16_t type);

typedef struct PrMsgHeader {
	uint16_t type;
	uint32_t length; /* of the body, bytes */
} PrMsgHeader;

/* The longest body that is accepted for a type. Unknown types: 64 KiB, which are skipped. */
uint32_t pr_msg_max_length(uint16_t type);
void pr_header_encode(uint8_t out[PR_WIRE_HEADER_BYTES], uint16_t type, uint32_t length);
gboolean pr_header_decode(const uint8_t in[PR_WIRE_HEADER_BYTES], PrMsgHeader *ret, GError **error);

typedef enum PrHelloRole { PR_HELLO_SOURCE = 1, PR_HELLO_DESTINATION = 2 } PrHelloRole;

typedef enum PrResume {
	PR_RESUME_NO = 0,	 /* a new migration */
	PR_RESUME_ASKED = 1,	 /* the operator resumes a migration in postcopy */
	PR_RESUME_AUTOMATIC = 2, /* the source resumes by itself */
	PR_RESUME_STANDBY = 3,	 /* this connection is a standby path */
} PrResume;

#define PR_HELLO_CAN_ZSTD   1u /* understands RECV_BITMAP_ZSTD */
#define PR_HELLO_CAN_VERIFY 2u /* source: answers REQ_HASHES; destination: will send them */

/* The highest byte of the capabilities: how many urgent lanes beyond the first the source can
 * serve (HELLO), and how many the destination wants (HELLO_ACK). A peer of an earlier release has
 * 0 there. */
static inline uint64_t pr_hello_more_lanes(guint n)
{
	return (uint64_t)n << 56;
}

static inline guint pr_hello_get_more_lanes(uint64_t capabilities)
{
	return (guint)(capabilities >> 56);
}

typedef struct PrWireBlock {
	char idstr[PR_IDSTR_MAX + 1];
	uint64_t size;
	uint32_t page_size;
} PrWireBlock;

typedef struct PrHello {
	uint16_t version;
	uint8_t role; /* PrHelloRole */
	uint8_t uuid[PR_UUID_BYTES];
	uint64_t epoch;			 /* 1 for the first connection, higher for each later one */
	uint8_t resume;			 /* PrResume */
	uint8_t secret[PR_SECRET_BYTES]; /* of the migration, made by the source */
	uint64_t capabilities;		 /* PR_HELLO_CAN_…; unknown bits are ignored */
	char scheme[16];		 /* of the data path that the source is going to connect */
	uint32_t n_blocks;
	PrWireBlock *blocks;
} PrHello;
void pr_hello_clear(PrHello *hello);
void pr_hello_copy(PrHello *ret, const PrHello *hello);
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(PrHello, pr_hello_clear)

typedef enum PrHelloStatus {
	PR_HELLO_OK = 0,
	PR_HELLO_COMPLETED = 1, /* the destination has all pages: the source may complete, too */
	PR_HELLO_REFUSED = 2,	/* with a reason */
	PR_HELLO_PAUSED_BY_OPERATOR =
		3, /* likewise: the operator has paused this side, no automatic recovery */
} PrHelloStatus;

typedef struct PrProgress {
	uint64_t received_pages;    /* pages in place, zero pages and holes included */
	uint64_t postcopy_requests; /* READs posted for faults */
	uint64_t postcopy_bytes;    /* bytes of guest RAM read since the switch-over */
	uint64_t remaining;	    /* bytes not yet in place */
	uint64_t zero_pages;	    /* pages that did not travel */
} PrProgress;
#define PR_PROGRESS_BYTES 40

/* A standby path, which may be a rail. */
typedef struct PrRail {
	uint64_t epoch; /* of its lanes */
	uint64_t bytes; /* of guest RAM that this path has carried, with its earlier connections */
	gboolean pulls;
} PrRail;
#define PR_RAILS_MAX 64 /* in one RAILS message */

typedef struct PrLost {
	uint64_t epoch;		     /* of the connection that was lost */
	gboolean paused_by_operator; /* else its path failed */
	char reason[PR_REASON_MAX + 1];
} PrLost;

typedef struct PrActivate {
	uint64_t epoch; /* from now on */
	uint8_t resume; /* PR_RESUME_ASKED or PR_RESUME_AUTOMATIC */
} PrActivate;

typedef struct PrProbed {
	uint64_t count;	 /* probes that were answered so far */
	uint64_t rtt_us; /* of the last one */
} PrProbed;

typedef struct PrHelloAck {
	uint32_t status; /* PrHelloStatus */
	uint64_t capabilities;
	uint16_t data_port;  /* where the data path listens; 0: the control port */
	PrProgress progress; /* with PR_HELLO_COMPLETED: the final figures */
	char reason[PR_REASON_MAX + 1];
} PrHelloAck;

typedef struct PrLaneHello {
	uint8_t uuid[PR_UUID_BYTES];
	uint64_t epoch;
	uint8_t token[PR_TOKEN_BYTES]; /* valid for this lane only; does not reveal the secret */
	uint8_t lane;		       /* PrLaneId */
} PrLaneHello;
#define PR_LANE_HELLO_BYTES (4 + PR_UUID_BYTES + 8 + PR_TOKEN_BYTES + 1) /* incl. magic; 45 */

/* Each stamp is read only by the host that made it, so the clocks need not agree. The round trip is
 * now - echo - echo_age. */
typedef struct PrHeartbeatBody {
	uint64_t stamp; /* microseconds, when this heartbeat left */
	uint64_t echo;	/* stamp of the last heartbeat that the sender has received; 0: none yet */
	uint64_t echo_age; /* microseconds since the sender received that */
} PrHeartbeatBody;
#define PR_HEARTBEAT_BYTES 24

typedef struct PrWireRange {
	uint64_t offset, length; /* bytes within the block */
} PrWireRange;

typedef struct PrWireGrant {
	uint64_t offset, length; /* bytes within the block */
	uint64_t addr, key;	 /* remote address and key of its first byte, for the transport */
} PrWireGrant;

typedef struct PrReqPages {
	uint32_t block;	 /* index in the block table */
	uint64_t start;	 /* bytes within the block */
	uint32_t length; /* bytes, at most 1 MiB */
} PrReqPages;
#define PR_REQ_PAGES_BYTES 16

typedef struct PrPackaged {
	gboolean last;		/* the end of the device state */
	gboolean guest_running; /* the guest was running when the source stopped it */
	const uint8_t *data;	/* within the body */
	gsize length;
} PrPackaged;

/* Of the pages of one range. */
typedef struct PrHashes {
	uint32_t block;
	uint64_t offset; /* bytes within the block */
	uint32_t n;
	uint64_t hash[PR_HASHES_MAX];
} PrHashes;

/* Encoders append a body to a GByteArray made by the caller. */
void pr_hello_encode(GByteArray *out, const PrHello *hello);
void pr_hello_ack_encode(GByteArray *out, const PrHelloAck *ack);
void pr_lane_hello_encode(GByteArray *out, const PrLaneHello *lane);
void pr_heartbeat_encode(uint8_t out[PR_HEARTBEAT_BYTES], const PrHeartbeatBody *heartbeat);
void pr_u32_encode(GByteArray *out, uint32_t value);
/* Any text becomes a reason as it can be sent: clean UTF-8 of at most PR_REASON_MAX bytes. Of a
 * longer text the middle is left out, which is mostly a long URI: the end, which says why,
 * survives. */
void pr_reason_copy(char ret[PR_REASON_MAX + 1], const char *reason);
void pr_reason_encode(GByteArray *out, const char *reason); /* as pr_reason_copy() makes it */
void pr_advise_encode(GByteArray *out, uint64_t page_size_summary, uint64_t target_page_size);
void pr_ranges_encode(GByteArray *out, uint32_t block, const PrWireRange *ranges, guint n);
void pr_grants_encode(GByteArray *out, uint32_t block, const PrWireGrant *grants, guint n);
void pr_packaged_encode(GByteArray *out, gboolean last, gboolean guest_running, const void *data,
			gsize length);
void pr_block_name_encode(GByteArray *out, const char *idstr);
/* Returns the type of the message: compressed where that is shorter and the peer can read it. */
uint16_t pr_recv_bitmap_encode(GByteArray *out, const char *idstr, const unsigned long *bits,
			       uint64_t n_bits, gboolean may_compress);
void pr_req_pages_encode(uint8_t out[PR_REQ_PAGES_BYTES], const PrReqPages *req);
void pr_progress_encode(GByteArray *out, const PrProgress *progress);
void pr_rails_encode(GByteArray *out, const PrRail *rails, guint n);
void pr_hashes_encode(GByteArray *out, const PrHashes *hashes);
void pr_lost_encode(GByteArray *out, const PrLost *lost);
void pr_activate_encode(GByteArray *out, const PrActivate *activate);
void pr_probed_encode(GByteArray *out, const PrProbed *probed);

/* Decoders read a whole body. A body that is too short, too long or has values out of bounds is
 * MALFORMED, and the outputs are not set. */
gboolean pr_hello_decode(const uint8_t *body, gsize len, PrHello *ret, GError **error);
gboolean pr_hello_ack_decode(const uint8_t *body, gsize len, PrHelloAck *ret, GError **error);
gboolean pr_lane_hello_decode(const uint8_t *body, gsize len, PrLaneHello *ret, GError **error);
gboolean pr_heartbeat_decode(const uint8_t *body, gsize len, PrHeartbeatBody *ret, GError **error);
gboolean pr_u32_decode(const uint8_t *body, gsize len, uint32_t *ret, GError **error);
gboolean pr_reason_decode(const uint8_t *body, gsize len, char ret[PR_REASON_MAX + 1],
			  GError **error);
gboolean pr_advise_decode(const uint8_t *body, gsize len, uint64_t *ret_summary,
			  uint64_t *ret_target_page_size, GError **error);
/* *ret_ranges is the caller's to g_free(). */
gboolean pr_ranges_decode(const uint8_t *body, gsize len, uint32_t *ret_block,
			  PrWireRange **ret_ranges, guint *ret_n, GError **error);
gboolean pr_grants_decode(const uint8_t *body, gsize len, uint32_t *ret_block,
			  PrWireGrant **ret_grants, guint *ret_n, GError **error);
gboolean pr_packaged_decode(const uint8_t *body, gsize len, PrPackaged *ret, GError **error);
gboolean pr_block_name_decode(const uint8_t *body, gsize len, char ret[PR_IDSTR_MAX + 1],
			      GError **error);
/* *ret_bits holds ceil(n_bits / 64) * 64 bits and is the caller's to g_free(). */
gboolean pr_recv_bitmap_decode(uint16_t type, const uint8_t *body, gsize len,
			       char ret_idstr[PR_IDSTR_MAX + 1], uint64_t n_bits,
			       unsigned long **ret_bits, GError **error);
/* The block a RECV_BITMAP body is about, before its length is known. */
gboolean pr_recv_bitmap_name(const uint8_t *body, gsize len, char ret_idstr[PR_IDSTR_MAX + 1],
			     GError **error);
gboolean pr_req_pages_decode(const uint8_t *body, gsize len, PrReqPages *ret, GError **error);
gboolean pr_progress_decode(const uint8_t *body, gsize len, PrProgress *ret, GError **error);
/* *ret_rails is the caller's to g_free(). */
gboolean pr_rails_decode(const uint8_t *body, gsize len, PrRail **ret_rails, guint *ret_n,
			 GError **error);
gboolean pr_hashes_decode(const uint8_t *body, gsize len, PrHashes *ret, GError **error);
gboolean pr_lost_decode(const uint8_t *body, gsize len, PrLost *ret, GError **error);
gboolean pr_activate_decode(const uint8_t *body, gsize len, PrActivate *ret, GError **error);
gboolean pr_probed_decode(const uint8_t *body, gsize len, PrProbed *ret, GError **error);
