/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine as a program: one process for each VM and side. */
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
#include "util/try-alloc.h"
#include "transport/net/tls.h"
#include "transport/transport.h"

#define EXIT_USAGE    2
#define LAST_WORDS_MS 1000 /* that the end waits for whoever reads the log */

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
	PrGuestHelper helper; /* until the guest has it */
	PrMonitor *monitor;
} Engine;

static const char summary[] =
	"Moves the running guest of a VMM to another host, its memory by postcopy, and recovers when a\n"
	"path fails. One engine runs beside the VMM on each side; it takes its orders by QMP or HMP.";

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
		"                             a stock QEMU by its QMP socket; needs root, to attach to\n"
		"                             its process. pid: that process, where another one has made\n"
		"                             the socket. agent: do not attach, but use the socket of\n"
		"                             libpostroad-agent.so preloaded into it\n"
		"  agent:PATH                 a program that links the agent library\n"
		"\n"
		"Paths: SCHEME:HOST:PORT[?KEY=VALUE[&KEY=VALUE]...]; an IPv6 address in brackets;\n"
		"several separated by commas, in order of preference; ?bind=ADDRESS: connect from there\n");

	pr_transport_describe(text);
	g_string_append_c(text, '\n');
	append_parameters(text);
	g_string_append(
		text,
		"\nExample; on the destination host, then on the source host:\n"
		"  postroad --guest qemu:qmp=/run/vm/qmp.sock \\\n"
		"           --incoming ofi:10.0.1.2:4444,ofi:10.0.2.2:4444 --qmp /run/vm/pr.sock \\\n"
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
		{"guest", 'g', 0, G_OPTION_ARG_STRING, &options->guest, "what is migrated",
		 "GUEST"},
		{"incoming", 'i', 0, G_OPTION_ARG_STRING, &options->incoming,
		 "be the destination: listen on these paths, or wait for migrate_incoming",
		 "URI[,URI...]|defer"},
		{"qmp", 'q', 0, G_OPTION_ARG_FILENAME, &options->qmp,
		 "serve QMP on this unix socket", "PATH"},
		{"hmp", 'm', 0, G_OPTION_ARG_NONE, &options->hmp,
		 "take HMP lines from standard input", NULL},
		{"set", 's', 0, G_OPTION_ARG_STRING_ARRAY, &options->set,
		 "set a parameter or a capability; may be repeated", "KEY=VALUE"},
		{"log", 'l', 0, G_OPTION_ARG_STRING, &options->log,
		 "what to log: error, warning, info (default) or debug", "LEVEL"},
		{"tls-dir", 't', 0, G_OPTION_ARG_FILENAME, &options->tls_dir,
		 "use TLS, with the certificates of this directory (as QEMU's tls-creds-x509)",
		 "DIR"},
		{"tls-allow", 'a', 0, G_OPTION_ARG_STRING_ARRAY, &options->tls_allow,
		 "destination: let in only sources whose certificate has this name; may be repeated",
		 "CN|DN"},
		{"insecure", 0, 0, G_OPTION_ARG_NONE, &options->insecure,
		 "listen without TLS on addresses that other hosts can reach", NULL},
		{"user", 'u', 0, G_OPTION_ARG_STRING, &options->user,
		 "become this user before listening for a migration (started as root)", "NAME"},
		{"group", 0, 0, G_OPTION_ARG_STRING, &options->group,
		 "with --user: and this group (default: the user's)", "NAME"},
		{"sandbox", 0, 0, G_OPTION_ARG_STRING, &options->sandbox,
		 "deny this process the system calls that it never needs (default on)", "on|off"},
		{"resume", 'r', 0, G_OPTION_ARG_NONE, &options->resume,
		 "go on with the migration that an engine which has died has left behind; harmless when "
		 "there is none",
		 NULL},
		{"state-dir", 0, 0, G_OPTION_ARG_FILENAME, &options->state_dir,
		 "source: where to note what --resume needs (default: /run/postroad, or in "
		 "$XDG_RUNTIME_DIR; with --user /run/postroad-NAME)",
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

/* Everything about the options that can be told without touching anything. */
static gboolean validate(const Options *options, int argc, char **argv, PrParams *params,
			 GLogLevelFlags *ret_level, GError **error)
{
	if (argc > 1)
		return usage(error, "unexpected argument '%s'", argv[1]);
	if (!options->guest)
		return usage(error, "--guest is missing: say what is to be migrated");
	if (!options->qmp && !options->hmp &&
	    (!options->incoming || !strcmp(options->incoming, "defer")))
		return usage(error, "nobody could command this engine: give --qmp PATH or --hmp");
	if (!pr_log_parse_level(options->log ? options->log : "info", ret_level))
		return usage(error, "--log '%s': expected error, warning, info or debug",
			     options->log);
	if (options->tls_allow && !options->tls_dir)
		return usage(error, "--tls-allow needs --tls-dir");
	if (options->insecure && options->tls_dir)
		return usage(error, "--insecure and --tls-dir exclude each other");
	if (options->group && !options->user)
		return usage(error, "--group needs --user");
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
	g_info("a signal asks this engine to end");
	on_quit(opaque);
	return G_SOURCE_CONTINUE;
}

/* A descriptor for the same terminal or pipe that does not block; the flag of standard input and output
 * themselves is shared with the shell and stays as it is. A file keeps its position this way. */
static int own_descriptor(int fd, int flags)
{
	struct stat st;
	int own = -1;

	if (fstat(fd, &st) == 0 && (S_ISCHR(st.st_mode) || S_ISFIFO(st.st_mode))) {
		g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);

		own = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	}
	if (own < 0) {
		own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
		if (own >= 0)
			g_unix_set_fd_nonblocking(own, TRUE, NULL);
	}
	return own;
}

static gboolean serve_terminal(PrMonitor *monitor, GError **error)
{
	int in = own_descriptor(STDIN_FILENO, O_RDONLY);
	int out = own_descriptor(STDOUT_FILENO, O_WRONLY);

	if (in < 0 || out < 0) {
		g_set_error(error, G_OPTION_ERROR, G_OPTION_ERROR_FAILED,
			    "--hmp: standard input and output must be open");
		return FALSE;
	}
	pr_monitor_hmp(monitor, in, out, isatty(STDIN_FILENO));
	return TRUE;
}

/* Before there are threads. */
static void prepare_process(void)
{
	static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
	struct rlimit limit;

	signal(SIGPIPE, SIG_IGN);
	/* A library of libfabric's PSM provider has put handlers there that write files into the current
	 * directory. */
	for (gsize i = 0; i < G_N_ELEMENTS(fatal); i++)
		signal(fatal[i], SIG_DFL);
	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
		limit.rlim_cur = limit.rlim_max;
		setrlimit(RLIMIT_NOFILE, &limit);
	}
}

/* From here on it has only what it needs. What a recovery will read must be there for it. */
static gboolean give_up_privileges(const Options *options, Engine *engine, GError **error)
{
	g_autoptr(PrTls) again = NULL;

	if (!pr_sandbox_enter(&engine->sandbox, error))
		return FALSE;
	if (!options->user || !options->tls_dir)
		return TRUE;
	again = pr_tls_new(options->tls_dir, NULL, error);
	if (!again)
		g_prefix_error(error,
			       "--tls-dir: user %s reads it for each connection: ", options->user);
	return again != NULL;
}

static gboolean take_up(const Options *options, PrMigration *migration, PrRole *ret_role,
			GError **error)
{
	g_autofree char *dir = options->state_dir ? g_strdup(options->state_dir)
						  : pr_handover_record_default_dir();

	return pr_migration_keep_record(migration, dir, options->guest, error) &&
	       pr_migration_resume(migration, options->resume, ret_role, error);
}

/* The same arguments serve whichever side an engine is on by now. */
static gboolean wants_incoming(const Options *options, PrRole role)
{
	if (options->incoming && role == PR_ROLE_SOURCE)
		g_message("--incoming has to wait: this engine is the source of a migration");
	return options->incoming && role != PR_ROLE_SOURCE &&
	       strcmp(options->incoming, "defer") != 0;
}

/* GLib starts a thread of its own for the first signal source, and aborts if it gets none. It starts here, before
 * the migration's threads can take the last one. SIGTERM keeps its default action until the main loop is about to run. */
static gboolean begin_signal_thread(GError **error)
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
	/* Before the migration's threads and what they use of RDMA: see sandbox.c. Nobody gives a command before the
	 * main loop runs. */
	if (!give_up_privileges(options, engine, error) || !begin_signal_thread(error))
		return FALSE;
	if (!take_up(options, migration, &role, error))
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
	pr_loop_watch(pr_migration_watchdog(migration), g_main_context_default());
	g_main_loop_run(engine->loop);
	pr_loop_watch(NULL, g_main_context_default());
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

/* The user to become must be able to write down what --resume needs. */
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
	/* The helper first, which keeps what is then given up. All before the first thread, which is the log's. */
	if (!pr_guest_fork_helper(options.guest, engine.sandbox.filter, &engine.helper, &error) ||
	    !prepare_sandbox(&options, &engine, &error) ||
	    !pr_log_start(level, STDERR_FILENO, &error)) {
		fprintf(stderr, "postroad: %s\n", error->message);
		return 1;
	}
	prepare_process();
	if (!pr_check_fd_headroom(&error)) {
		pr_log_last_words("postroad: %s\n", error->message);
		return 1;
	}
	warming = g_thread_try_new("warm-up", warm_up, NULL, NULL);
	ok = run(&options, &engine, &error);
	/* A library that is still setting itself up can't be unloaded. */
	if (warming)
		g_thread_join(warming);
	if (ok)
		pr_log_flush(LAST_WORDS_MS);
	else
		pr_log_last_words("postroad: %s\n", error->message);
	return ok ? 0 : 1;
}
