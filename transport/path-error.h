/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The error domain of paths: of their connections and their data paths. A lack of threads,
 * descriptors or memory is a PR_RESOURCE_ERROR (util/try-alloc.h). */
#pragma once

#include <glib.h>

typedef enum PrPathError {
	PR_PATH_ERROR_CONNECT, /* could not be connected; the text says to where, and why */
	PR_PATH_ERROR_REFUSED, /* the peer refused the connection; the text has its reason */
	PR_PATH_ERROR_LOST,    /* it was up, and failed */
	PR_PATH_ERROR_CLOSED,  /* the peer closed the data path; the control channel may say why */
	PR_PATH_ERROR_SILENT,  /* nothing came in within the heartbeat timeout */
	PR_PATH_ERROR_TIMEOUT, /* a step of the handshake took too long */
	PR_PATH_ERROR_PEER,    /* the peer has said that it leaves (PR_MSG_PAUSE) */
	PR_PATH_ERROR_PAUSED_BY_OPERATOR, /* the operator has paused the peer (PR_MSG_HOLD) */
	PR_PATH_ERROR_LOCAL_REQUEST,	  /* this side ended it on purpose: a command, or its end */
} PrPathError;

#define PR_PATH_ERROR pr_path_error_quark()
GQuark pr_path_error_quark(void);
