/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "migration/postcopy/repeats.h"

void pr_repeats_note(PrRepeats *self, guint n, guint fresh, int64_t now_ns)
{
	if (fresh > 0 || now_ns - self->last_ns > PR_REPEATS_SELDOM_NS)
		*self = (PrRepeats){0};
	if (fresh > 0)
		return;
	self->last_ns = now_ns;
	self->row += n;
	if (self->row <= PR_REPEATS_ROW || self->rest_us > 0)
		return;
	self->rest_us = MIN(PR_REST_MIN_US << MIN(self->rests, 8u), PR_REST_MAX_US);
	self->rests++;
}

guint pr_repeats_take_rest(PrRepeats *self)
{
	guint rest_us = self->rest_us;

	self->rest_us = 0;
	return rest_us;
}
