/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reads members of a QMP object, whose types are checked as they come from another process. */
#pragma once

#include <json-glib/json-glib.h>

static inline JsonNode *pr_json_value(JsonObject *object, const char *member, GType type)
{
	JsonNode *node = json_object_get_member(object, member);

	return node && JSON_NODE_HOLDS_VALUE(node) && json_node_get_value_type(node) == type ? node
											     : NULL;
}

/* NULL: no such string. */
static inline const char *pr_json_string(JsonObject *object, const char *member)
{
	JsonNode *node = pr_json_value(object, member, G_TYPE_STRING);

	return node ? json_node_get_string(node) : NULL;
}

/* 0: no such number. */
static inline gint64 pr_json_int(JsonObject *object, const char *member)
{
	JsonNode *node = pr_json_value(object, member, G_TYPE_INT64);

	return node ? json_node_get_int(node) : 0;
}

/* FALSE: no such boolean. */
static inline gboolean pr_json_boolean(JsonObject *object, const char *member)
{
	JsonNode *node = pr_json_value(object, member, G_TYPE_BOOLEAN);

	return node && json_node_get_boolean(node);
}

/* NULL: no such object. */
static inline JsonObject *pr_json_object(JsonObject *object, const char *member)
{
	JsonNode *node = json_object_get_member(object, member);

	return node && JSON_NODE_HOLDS_OBJECT(node) ? json_node_get_object(node) : NULL;
}
