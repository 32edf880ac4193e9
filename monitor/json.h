/* SPDX-License-Identifier: GPL-2.0-or-later */
/* JSON nodes that own their value. (json_node_init_object() would take another reference.) */
#pragma once

#include <json-glib/json-glib.h>

static inline JsonNode *pr_json_object(JsonObject *object)
{
	JsonNode *node = json_node_new(JSON_NODE_OBJECT);

	json_node_take_object(node, object);
	return node;
}

static inline JsonNode *pr_json_array(JsonArray *array)
{
	JsonNode *node = json_node_new(JSON_NODE_ARRAY);

	json_node_take_array(node, array);
	return node;
}

static inline JsonNode *pr_json_string(const char *text)
{
	return json_node_init_string(json_node_alloc(), text);
}
