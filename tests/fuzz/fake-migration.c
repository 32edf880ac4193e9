/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "tests/fuzz/fake-migration.h"

#include "transport/uri.h"

void fake_migration_set(PrMigration *migration, PrState state)
{
	migration->state = state;
	pr_monitor_on_state(state, "fake reason", migration->monitor);
}

static gboolean check_uris(const char *text, gboolean listening, GError **error)
{
	g_autoptr(GPtrArray) uris = pr_uri_list_parse(text, listening, error);

	return uris != NULL;
}

gboolean pr_migration_start(PrMigration *migration, const char *uris, gboolean resume,
			    GError **error)
{
	if (!check_uris(uris, FALSE, error))
		return FALSE;
	fake_migration_set(migration, resume ? PR_STATE_POSTCOPY_RECOVER_SETUP : PR_STATE_SETUP);
	pr_monitor_on_path(uris, PR_PATH_FAILED, NULL, uris, migration->monitor);
	return TRUE;
}

gboolean pr_migration_incoming(PrMigration *migration, const char *uris, GCancellable *cancel,
			       GError **error)
{
	return check_uris(uris, TRUE, error);
}

gboolean pr_migration_recover(PrMigration *migration, const char *uris, GCancellable *cancel,
			      GError **error)
{
	return check_uris(uris, TRUE, error);
}

gboolean pr_migration_pause(PrMigration *migration, GError **error)
{
	if (pr_state_is_postcopy(migration->state)) {
		fake_migration_set(migration, PR_STATE_POSTCOPY_PAUSED);
		return TRUE;
	}
	g_set_error(error, PR_MIGRATION_ERROR, PR_MIGRATION_ERROR_STATE, "not while it is %s",
		    pr_state_name(migration->state));
	return FALSE;
}

gboolean pr_migration_cancel(PrMigration *migration, GError **error)
{
	fake_migration_set(migration, PR_STATE_CANCELLED);
	return TRUE;
}

void pr_migration_query(PrMigration *migration, PrMigrationInfo *ret)
{
	*ret = (PrMigrationInfo){
		.role = PR_ROLE_SOURCE,
		.state = migration->state,
		.reason = g_strdup("fake reason"),
		.uuid = "5a8c",
		.total = 64 << 20,
		.remaining = 16 << 20,
		.page_size = 4096,
		.paths = g_ptr_array_new(),
	};
}

void pr_migration_info_clear(PrMigrationInfo *info)
{
	g_free(info->reason);
	g_clear_pointer(&info->paths, g_ptr_array_unref);
}
