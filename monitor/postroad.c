/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine program: one process for each VM on each side of a migration. */
#include <fcntl.h>
#include <glib-unix.h>
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest/guest.h"
#include "migration/migration.h"
#include "migration/source/handover-record.h"
#include "monitor/log.h"
#include "monitor/main-loop-watchdog.h"
#include "monitor/monitor.h"
#include "monitor/sandbox.h"
#include "transport/net/tls.h"
#include "transport/registry.h"
#include "util/try-alloc.h"

#define EXIT_USAGE 2

typedef struct Options {
	char *guest;
	char *incoming;
	char *qmp;
	char **set;
	char *log;
	char *tls_dir;
	char **tls_allow;
	char *user, *group;
	char *sandbox;
	gboolean insecure;
	char *state_dir;
	gboolean resume;
	gboolean hmp;
	gboolean version;
} Options;

static void options_clear(Options *options)
{
	g_free(options->guest);
	g_free(options->incoming);
	g_free(options->qmp);
	g_strfreev(options->set);
	g_free(options->log);
	g_free(options->tls_dir);
	g_strfreev(options->tls_allow);
	g_free(options->user);
	g_free(options->group);
	g_free(options->sandbox);
	g_free(options->state_dir);
}
G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(Options, options_clear)

typedef struct Engine {
	GMainLoop *loop;
	PrParams params;
	PrSecurity security;
	PrSandbox sandbox;
	PrGuestHelper helper; /* owned by the guest once that is open */
	PrMonitor *monitor;
} Engine;

static const char summary[] =
	"Migrates the running guest of a VMM to another host. Its memory is moved by postcopy,\n"
	"and the migration recovers when a path fails. One engine runs beside the VMM on each\n"
	"host. Control it by QMP or HMP.";

static void append_parameters(GString *text)
{
	g_string_append(text, "Parameters (--set, migrate_set_parameter):\n");
	for (guint i = 0; i < PR_N_PARAMS; i++) {
		const PrParamInfo *info = pr_param_info(i);
		g_autofree char *range = NULL;

		if (info->max == G_MAXINT64)
			range = g_strdup_printf("%" G_GUINT64_FORMAT "...", info->min);
		else
			range = g_strdup_printf("%" G_GUINT64_FORMAT "..%" G_GUINT64_FORMAT,
						info->min, info->max);
		g_string_append_printf(text,
				       "  %-23s %s\n"
				       "                          default %" G_GUINT64_FORMAT
				       ", range %s, in %s\n",
				       info->name, info->help, info->def, range, info->unit);
	}
	g_string_append(text, "\nCapabilities (--set NAME=on|off, migrate_set_capability):\n");
	for (guint i = 0; i < PR_N_CAPABILITIES; i++) {
		const PrCapabilityInfo *info = pr_capability_info(i);

		g_string_append_printf(text, "  %-23s %s (%s %s)\n", info->name, info->help,
				       info->fixed ? "always" : "default",
				       info->def ? "on" : "off");
	}
}

static char *describe(void)
{
	g_autoptr(GString) text = g_string_new(
		"Guests:\n"
		"  qemu:qmp=PATH[,pid=N][,agent=PATH]\n"
		"      a stock QEMU, reached at its QMP socket. Attaching to its process needs "
		"root.\n"
		"      pid: QEMU's process ID, needed when another process created the QMP "
		"socket.\n"
		"      agent: don't attach, but use this socket of a libpostroad-agent.so that "
		"was\n"
		"      preloaded into QEMU.\n"
		"  agent:PATH\n"
		"      a program that links the agent library, reached at this socket\n"
		"\n"
		"Paths: SCHEME:HOST:PORT[?KEY=VALUE[&KEY=VALUE]...]\n"
		"Write an IPv6 address in brackets. Write several paths with commas between them, "
		"in\n"
		"order of preference.\n"
		"?bind=ADDRESS: the local address to connect from\n");

	pr_transport_describe(text);
	g_string_append_c(text, '\n');
	append_parameters(text);
	g_string_append(
		text,
		"\nExample. On the destination host first, then on the source host:\n"
		"  postroad --guest qemu:qmp=/run/vm/qmp.sock \\\n"
		"           --incoming ofi:10.0.1.2:4444,ofi:10.0.2.2:4444 --qmp /run/vm/pr.sock "
		"\\\n"
		"           --tls-dir /etc/pki/postroad\n"
		"  postroad --guest qemu:qmp=/run/vm/qmp.sock \\\n"
		"           --qmp /run/vm/pr.sock --tls-dir /etc/pki/postroad &\n"
		"  postroadctl /run/vm/pr.sock 'migrate -d ofi:10.0.1.2:4444,ofi:10.0.2.2:4444'\n"
		"  postroadctl /run/vm/pr.sock watch\n");
	return g_string_free(g_steal_pointer(&text), FALSE);
}

static gboolean parse_options(Options *options, int *argc, char ***argv, GError **error)
{
	const GOptionEntry entries[] = {
		{"guest", 'g', 0, G_OPTION_ARG_STRING, &options->guest, "the guest to migrate",
		 "GUEST"},
		{"incoming", 'i', 0, G_OPTION_ARG_STRING, &options->incoming,
		 "be the destination and listen on these paths; defer: wait for migrate_incoming",
		 "URI[,URI...]|defer"},
		{"qmp", 'q', 0, G_OPTION_ARG_FILENAME, &options->qmp,
		 "serve QMP on this unix socket", "PATH"},
		{"hmp", 'm', 0, G_OPTION_ARG_NONE, &options->hmp,
		 "read HMP commands from standard input", NULL},
		{"set", 's', 0, G_OPTION_ARG_STRING_ARRAY, &options->set,
		 "set a parameter or a capability; may be repeated", "KEY=VALUE"},
		{"log", 'l', 0, G_OPTION_ARG_STRING, &options->log,
		 "the least important level to log: error, warning, info (default) or debug",
		 "LEVEL"},
		{"tls-dir", 't', 0, G_OPTION_ARG_FILENAME, &options->tls_dir,
		 "use TLS with the certificates in this directory (file names as for QEMU's "
		 "tls-creds-x509)",
		 "DIR"},
		{"tls-allow", 'a', 0, G_OPTION_ARG_STRING_ARRAY, &options->tls_allow,
		 "destination: accept only sources whose certificate has this name; may be "
		 "repeated",
		 "CN|DN"},
		{"insecure", 0, 0, G_OPTION_ARG_NONE, &options->insecure,
		 "allow listening without TLS on addresses that other hosts can reach", NULL},
		{"user", 'u', 0, G_OPTION_ARG_STRING, &options->user,
		 "change to this user before listening for a migration (needs root)", "NAME"},
		{"group", 0, 0, G_OPTION_ARG_STRING, &options->group,
		 "with --user: change to this group (default: the user's own)", "NAME"},
		{"sandbox", 0, 0, G_OPTION_ARG_STRING, &options->sandbox,
		 "deny this process the system calls that it never needs (default: on)", "on|off"},
		{"resume", 'r', 0, G_OPTION_ARG_NONE, &options->resume,
		 "resume the migration that an engine left behind when it died; no effect when "
		 "there is "
		 "none",
		 NULL},
		{"state-dir", 0, 0, G_OPTION_ARG_FILENAME, &options->state_dir,
		 "source: the directory for the state that --resume needs (default: /run/postroad, "
		 "or "
		 "$XDG_RUNTIME_DIR/postroad when not root; with --user: /run/postroad-NAME)",
		 "DIR"},
		{"version", 'v', 0, G_OPTION_ARG_NONE, &options->version, "show the version", NULL},
		{NULL},
	};
	g_autoptr(GOptionContext) context = g_option_context_new(NULL);
	g_autofree char *description = describe();

	g_option_context_set_summary(context, summary);
	g_option_context_set_description(context, description);
	g_option_context_add_main_entries(context, entries, NULL);
	return g_option_context_parse(context, argc, argv, error);
}

static gboolean usage(GError **error, const char *format, ...) G_GNUC_PRINTF(2, 3);

static gboolean usage(GError **error, const char *format, ...)
{
	va_list ap;

	va_start(ap, format);
	if (error)
		*error = g_error_new_valist(G_OPTION_ERROR, G_OPTION_ERROR_BAD_VALUE, format, ap);
	va_end(ap);
	return FALSE;
}

static gboolean is_capability(const char *name)
{
	for (guint i = 0; i < PR_N_CAPABILITIES; i++)
		if (!strcmp(pr_capability_info(i)->name, name))
			return TRUE;
	return FALSE;
}

static gboolean apply_setting(PrParams *params, const char *setting, GError **error)
{
	g_auto(GStrv) pair = g_strsplit(setting, "=", 2);
	gboolean on;

	if (g_strv_length(pair) != 2 || !pair[0][0])
		return usage(error, "--set '%s': expected KEY=VALUE", setting);
	if (!is_capability(pair[0])) {
		if (pr_params_set_text(params, pair[0], pair[1], error))
			return TRUE;
		g_prefix_error(error, "--set: ");
		return FALSE;
	}
	on = !strcmp(pair[1], "on");
	if (!on && strcmp(pair[1], "off"))
		return usage(error, "--set %s: expected on or off, found '%s'", pair[0], pair[1]);
	if (pr_params_set_capability(params, pair[0], on, error))
		return TRUE;
	g_prefix_error(error, "--set: ");
	return FALSE;
}

/* Checks the options without any side effect. */
static gboolean validate(const Options *options, int argc, char **argv, PrParams *params,
			 GLogLevelFlags *ret_level, GError **error)
{
	if (argc > 1)
		return usage(error, "unexpected argument '%s'", argv[1]);
	if (!options->guest)
		return usage(
			error,
			"--guest is missing: name the guest to migrate, such as qemu:qmp=PATH");
	if (!options->qmp && !options->hmp &&
	    (!options->incoming || !strcmp(options->incoming, "defer")))
		return usage(error, "no way to control this engine: give --qmp PATH or --hmp");
	if (!pr_log_parse_level(options->log ? options->log : "info", ret_level))
		return usage(error, "--log '%s': expected error, warning, info or debug",
			     options->log);
	if (options->tls_allow && !options->tls_dir)
		return usage(error,
			     "--tls-allow needs --tls-dir: only TLS checks a certificate's name");
	if (options->insecure && options->tls_dir)
		return usage(error,
			     "--insecure and --tls-dir exclude each other: give one of them");
	if (options->group && !options->user)
		return usage(error, "--group needs --user: add it, or leave --group out");
	if (options->sandbox && strcmp(options->sandbox, "on") && strcmp(options->sandbox, "off"))
		return usage(error, "--sandbox '%s': expected on or off", options->sandbox);
	pr_params_init(params);
	for (char **setting = options->set; setting && *setting; setting++)
		if (!apply_setting(params, *setting, error))
			return FALSE;
	return TRUE;
}

static void on_quit(void *opaque)
{
	Engine *engine = opaque;

	g_main_loop_quit(engine->loop);
}

static gboolean on_signal(gpointer opaque)
{
	g_info("a signal ends this engine");
	on_quit(opaque);
	return G_SOURCE_CONTINUE;
}

/* Returns a non-blocking descriptor for the same terminal or pipe. The shell shares the flags of
 * standard input and output themselves, so these stay blocking. A file is duplicated, so that its
 * position is shared. */
static int reopen_nonblocking(int fd, int flags)
{
	struct stat st;
	int copy = -1;

	if (fstat(fd, &st) == 0 && (S_ISCHR(st.st_mode) || S_ISFIFO(st.st_mode))) {
		g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);

		copy = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	}
	if (copy < 0) {
		copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
		if (copy >= 0)
			g_unix_set_fd_nonblocking(copy, TRUE, NULL);
	}
	return copy;
}

static gboolean serve_terminal(PrMonitor *monitor, GError **error)
{
	int in = reopen_nonblocking(STDIN_FILENO, O_RDONLY);
	int out = reopen_nonblocking(STDOUT_FILENO, O_WRONLY);

	if (in < 0 || out < 0) {
		g_set_error(error, G_OPTION_ERROR, G_OPTION_ERROR_FAILED,
			    "--hmp: standard input or output is closed; start with both open");
		return FALSE;
	}
	pr_monitor_hmp(monitor, in, out, isatty(STDIN_FILENO));
	return TRUE;
}

/* Call it before threads start. */
static void prepare_process(void)
{
	static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
	struct rlimit limit;

	signal(SIGPIPE, SIG_IGN);
	/* A library of libfabric's PSM provider has installed handlers that write files into the
	 * current directory. */
	for (gsize i = 0; i < G_N_ELEMENTS(fatal); i++)
		signal(fatal[i], SIG_DFL);
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

/* Enters the sandbox. A recovery reads the TLS files again, so the new user must be able to. */
static gboolean give_up_privileges(const Options *options, Engine *engine, GError **error)
{
	g_autoptr(PrTls) readable = NULL;

	if (!pr_sandbox_enter(&engine->sandbox, error))
		return FALSE;
	if (!options->user || !options->tls_dir)
		return TRUE;
	readable = pr_tls_new(options->tls_dir, NULL, error);
	if (!readable)
		g_prefix_error(error,
			       "--tls-dir: user %s must be able to read it, for each connection: ",
			       options->user);
	return readable != NULL;
}

static gboolean resume_migration(const Options *options, PrMigration *migration, PrRole *ret_role,
				 GError **error)
{
	g_autofree char *dir = options->state_dir ? g_strdup(options->state_dir)
						  : pr_handover_record_default_dir();

	return pr_migration_keep_record(migration, dir, options->guest, error) &&
	       pr_migration_resume(migration, options->resume, ret_role, error);
}

/* An engine may be restarted with the same arguments after it has become the source. */
static gboolean wants_incoming(const Options *options, PrRole role)
{
	if (options->incoming && role == PR_ROLE_SOURCE)
		g_message("--incoming is ignored: this engine resumes a migration as the source");
	return options->incoming && role != PR_ROLE_SOURCE &&
	       strcmp(options->incoming, "defer") != 0;
}

/* GLib starts a thread for the first signal source, and aborts if it can't. So that thread starts
 * here, before the migration's threads can use up the limit of threads. SIGTERM keeps its default
 * action until the main loop is about to run. */
static gboolean start_signal_thread(GError **error)
{
	if (!pr_probe_thread(error))
		return FALSE;
	g_source_unref(g_unix_signal_source_new(SIGUSR2));
	return TRUE;
}

static gboolean serve(const Options *options, Engine *engine, PrMigration *migration,
		      GError **error)
{
	PrRole role;

	pr_monitor_attach(engine->monitor, migration);
	if (options->qmp && !pr_monitor_listen(engine->monitor, options->qmp, error))
		return FALSE;
	if (options->hmp && !serve_terminal(engine->monitor, error))
		return FALSE;
	/* This comes before the migration's threads and their RDMA descriptors (sandbox.c). No
	 * command can come before the main loop runs. */
	if (!give_up_privileges(options, engine, error) || !start_signal_thread(error))
		return FALSE;
	if (!resume_migration(options, migration, &role, error))
		return FALSE;
	if (wants_incoming(options, role) &&
	    !pr_migration_incoming(migration, options->incoming, NULL, error)) {
		if (options->user)
			g_prefix_error(error, "as user %s: ", options->user);
		g_prefix_error(error, "--incoming: ");
		return FALSE;
	}
	g_unix_signal_add(SIGTERM, on_signal, engine);
	g_unix_signal_add(SIGINT, on_signal, engine);
	pr_main_loop_watch(pr_migration_watchdog(migration), g_main_context_default());
	g_main_loop_run(engine->loop);
	pr_main_loop_watch(NULL, g_main_context_default());
	return TRUE;
}

static gboolean run(const Options *options, Engine *engine, GError **error)
{
	g_autoptr(PrMonitor) monitor = NULL;
	g_autoptr(PrGuest) guest = NULL;
	g_autoptr(GMainLoop) loop = NULL;
	PrMigrationHooks hooks;
	g_autoptr(PrTls) tls = NULL;
	PrMigration *migration;
	gboolean ok;

	if (options->tls_dir) {
		tls = pr_tls_new(options->tls_dir, (const char *const *)options->tls_allow, error);
		if (!tls) {
			g_prefix_error(error, "--tls-dir: ");
			return FALSE;
		}
	}
	engine->security = (PrSecurity){.tls = tls, .plain_net = options->insecure};
	guest = pr_guest_open(options->guest, &engine->helper,
			      pr_param(&engine->params, PR_PARAM_GUEST_TIMEOUT), error);
	if (!guest) {
		g_prefix_error(error, "--guest: ");
		return FALSE;
	}
	loop = g_main_loop_new(NULL, FALSE);
	engine->loop = loop;
	monitor = pr_monitor_new(&engine->params, g_main_context_default(), on_quit, engine);
	engine->monitor = monitor;
	hooks = pr_monitor_hooks(monitor);
	migration = pr_migration_new(guest, &engine->params, &hooks);
	pr_migration_secure(migration, &engine->security);
	ok = serve(options, engine, migration, error);
	pr_monitor_close(monitor);
	pr_migration_free(migration);
	return ok;
}

static gpointer warm_up(gpointer opaque)
{
	pr_transport_warm_up();
	return NULL;
}

/* The user of --user must be able to write the state that --resume needs. */
static gboolean prepare_sandbox(Options *options, Engine *engine, GError **error)
{
	if (options->user && !options->state_dir)
		options->state_dir = g_strconcat("/run/postroad-", options->user, NULL);
	return (!options->user ||
		pr_sandbox_make_dir(&engine->sandbox, options->state_dir, error)) &&
	       pr_sandbox_prepare(&engine->sandbox, error);
}

int main(int argc, char **argv)
{
	g_auto(Options) options = {0};
	g_autoptr(GError) error = NULL;
	Engine engine = {0};
	GLogLevelFlags level;
	GThread *warming;
	gboolean ok;

	setlocale(LC_CTYPE, "");
	if (!parse_options(&options, &argc, &argv, &error)) {
		fprintf(stderr, "postroad: %s; see postroad --help\n", error->message);
		return EXIT_USAGE;
	}
	if (options.version) {
		printf("postroad %s\n", PR_VERSION);
		return 0;
	}
	if (!validate(&options, argc, argv, &engine.params, &level, &error)) {
		fprintf(stderr, "postroad: %s; see postroad --help\n", error->message);
		return EXIT_USAGE;
	}
	engine.sandbox = (PrSandbox){.user = options.user,
				     .group = options.group,
				     .filter = g_strcmp0(options.sandbox, "off") != 0};
	/* The helper is forked first, because it keeps capabilities that the engine drops. Both
	 * come before the first thread, which is the log's. */
	if (!pr_guest_fork_helper(options.guest, engine.sandbox.filter, &engine.helper, &error) ||
	    !prepare_sandbox(&options, &engine, &error) ||
	    !pr_log_start(level, STDERR_FILENO, &error)) {
		fprintf(stderr, "postroad: %s\n", error->message);
		return 1;
	}
	prepare_process();
	if (!pr_check_fd_headroom(&error)) {
		pr_log_final("postroad: %s\n", error->message);
		return 1;
	}
	warming = g_thread_try_new("warm-up", warm_up, NULL, NULL);
	ok = run(&options, &engine, &error);
	/* exit() must not unload a library while it initializes. */
	if (warming)
		g_thread_join(warming);
	if (ok)
		pr_log_flush(PR_LOG_FINAL_FLUSH_MS);
	else
		pr_log_final("postroad: %s\n", error->message);
	return ok ? 0 : 1;
}
