/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Uses the devices of the Linux test guest, so that a migration finds them in use. It rewrites and
 * verifies the last 1 MiB of the VGA card's memory and the first 1 MiB of a virtio disk. It reads
 * random numbers, and sends back what it receives by UDP on port 7. Each page holds a pattern made
 * from its position and its generation, which grows with each round.
 *
 * Environment: devices, with any of "vram", "disk", "rng", "echo", "kvm". After each round over all
 * devices it prints:
 *
 *	guest: devices: rounds=3 bad=0
 *	guest: kvm: clock=kvm-clock steal=12 told=345		with "kvm": see print_kvm()
 */
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE	 4096u
#define WORDS	 (PAGE / sizeof(uint64_t))
#define N_PAGES	 256u
#define ROUND_MS 200
#define ECHO	 7 /* the port */

static void die(const char *what)
{
	printf("guest: fatal: devices: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t page_word(uint64_t page, uint64_t generation, unsigned int word)
{
	return ((page << 40 ^ generation << 16 ^ word) + 1) * 0x9e3779b97f4a7c15ull;
}

static void fill(volatile uint64_t *at, uint64_t page, uint64_t generation)
{
	for (unsigned int i = 0; i < WORDS; i++)
		at[i] = page_word(page, generation, i);
}

static bool is_right(const char *device, const volatile uint64_t *at, uint64_t page,
		     uint64_t generation)
{
	for (unsigned int i = 0; i < WORDS; i++) {
		uint64_t expected = page_word(page, generation, i), found = at[i];

		if (found == expected)
			continue;
		printf("guest: %s page %" PRIu64 " word %u: expected %016" PRIx64
		       " found %016" PRIx64 "\n",
		       device, page, i, expected, found);
		return false;
	}
	return true;
}

/* Opens the first BAR of the first PCI device whose class is that of a display. */
static int open_vram(void)
{
	glob_t found;
	int fd = -1;

	if (glob("/sys/bus/pci/devices/*/class", 0, NULL, &found))
		die("PCI devices");
	for (size_t i = 0; i < found.gl_pathc && fd < 0; i++) {
		char class[16] = "", path[256];
		int file = open(found.gl_pathv[i], O_RDONLY);

		if (file < 0 || read(file, class, sizeof(class) - 1) < 0)
			die(found.gl_pathv[i]);
		close(file);
		if (strncmp(class, "0x03", 4))
			continue;
		snprintf(path, sizeof(path), "%.*sresource0",
			 (int)(strlen(found.gl_pathv[i]) - strlen("class")), found.gl_pathv[i]);
		fd = open(path, O_RDWR | O_SYNC);
	}
	globfree(&found);
	return fd;
}

static volatile uint64_t *map_vram(void)
{
	int fd = open_vram();
	struct stat info;
	void *map;

	if (fd < 0 || fstat(fd, &info) < 0)
		die("VGA memory");
	map = mmap(NULL, N_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		   info.st_size - N_PAGES * PAGE);
	if (map == MAP_FAILED)
		die("mapping VGA memory");
	close(fd);
	return map;
}

/* Returns the number of wrong pages. The first generation is only written. */
static unsigned int use_vram(volatile uint64_t *vram, uint64_t generation)
{
	unsigned int bad = 0;

	for (unsigned int i = 0; i < N_PAGES; i++) {
		volatile uint64_t *page = vram + i * WORDS;

		if (generation && !is_right("vram", page, i, generation - 1))
			bad++;
		fill(page, i, generation);
	}
	return bad;
}

static unsigned int use_disk(int disk, uint64_t *buffer, uint64_t generation)
{
	unsigned int bad = 0;

	for (unsigned int i = 0; i < N_PAGES; i++) {
		off_t at = (off_t)i * PAGE;

		if (generation) {
			if (pread(disk, buffer, PAGE, at) != PAGE)
				die("reading the disk");
			if (!is_right("disk", buffer, i, generation - 1))
				bad++;
		}
		fill(buffer, i, generation);
		if (pwrite(disk, buffer, PAGE, at) != PAGE)
			die("writing the disk");
	}
	return bad;
}

static void use_rng(int rng)
{
	uint8_t bytes[16];

	if (read(rng, bytes, sizeof(bytes)) != sizeof(bytes))
		die("reading /dev/hwrng");
}

/* Sends datagrams back. A datagram is lost while the network is down or full. */
static void *echo(void *unused)
{
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(ECHO)};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	char datagram[2048];

	(void)unused;
	if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here)) < 0)
		die("the port for datagrams");
	for (;;) {
		struct sockaddr_in peer;
		socklen_t length = sizeof(peer);
		ssize_t n = recvfrom(fd, datagram, sizeof(datagram), 0, (struct sockaddr *)&peer,
				     &length);

		if (n >= 0)
			sendto(fd, datagram, (size_t)n, 0, (struct sockaddr *)&peer, length);
	}
	return NULL;
}

static void start_echo(void)
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, echo, NULL);
	if (errno)
		die("a thread");
}

/* Reads a file of /proc or /sys, and terminates the text. */
static void read_text(const char *path, char *text, size_t size)
{
	FILE *file = fopen(path, "r");

	if (!file)
		die(path);
	text[fread(text, 1, size - 1, file)] = '\0';
	fclose(file);
}

/* Returns the sum of the numbers that follow a word; there is one for each CPU. */
static unsigned long sum_behind(const char *text, const char *word)
{
	const char *at = strstr(text, word);
	unsigned long sum = 0, number;
	int length;

	for (at += at ? strlen(word) : 0; at && sscanf(at, " %lu%n", &number, &length) == 1;
	     at += length)
		sum += number;
	return sum;
}

/*
 * Prints Linux's clock source, the ticks that the host took from all CPUs (steal), and how often
 * KVM has notified the guest that a page is present (told: interrupts of asynchronous page
 * faults).
 */
static void print_kvm(void)
{
	static char text[16384];
	char clock[32] = "";
	unsigned long steal = 0;

	read_text("/sys/devices/system/clocksource/clocksource0/current_clocksource", clock,
		  sizeof(clock));
	clock[strcspn(clock, "\n")] = '\0';
	read_text("/proc/stat", text, sizeof(text));
	sscanf(text, "cpu %*u %*u %*u %*u %*u %*u %*u %lu", &steal);
	read_text("/proc/interrupts", text, sizeof(text));
	printf("guest: kvm: clock=%s steal=%lu told=%lu\n", clock, steal, sum_behind(text, "HYP:"));
}

static bool wanted(const char *device)
{
	const char *list = getenv("devices");

	return list && strstr(list, device);
}

int main(void)
{
	struct timespec rest = {.tv_nsec = ROUND_MS * 1000000};
	volatile uint64_t *vram = wanted("vram") ? map_vram() : NULL;
	int disk = wanted("disk") ? open("/dev/vda", O_RDWR | O_DIRECT) : -1;
	int rng = wanted("rng") ? open("/dev/hwrng", O_RDONLY) : -1;
	bool kvm = wanted("kvm");
	uint64_t *buffer = aligned_alloc(PAGE, PAGE);
	unsigned int bad = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!buffer || (wanted("disk") && disk < 0) || (wanted("rng") && rng < 0))
		die("opening the disk and the random number generator");
	if (wanted("echo"))
		start_echo();
	for (uint64_t generation = 0;; generation++) {
		if (vram)
			bad += use_vram(vram, generation);
		if (disk >= 0)
			bad += use_disk(disk, buffer, generation);
		if (rng >= 0)
			use_rng(rng);
		printf("guest: devices: rounds=%" PRIu64 " bad=%u\n", generation + 1, bad);
		if (kvm)
			print_kvm();
		nanosleep(&rest, NULL);
	}
}
