-- How differently each feature fires in two sources in a range, in a sample: an estimate of contrast_within.
--
-- Grain:   one row per feature that fires in either of the two there, what is surely the largest effect first.
-- Reads:   within_sample_contrast
-- Units:   rates and cohens_h are those of contrast_within, which they estimate: 95 of 100 samples have the true one
--          from low to high. The range is that of summary_within, without a source. The sample is that of
--          approximate_coactivation: n_seen counts its tokens of the source at which the feature fires, n_documents its
--          documents. The intervals are those of a feature chosen beforehand: see within_sample_contrast. Features that
--          do not fire in the sample have no row.
-- Parameters: a text, b text, since text = null, until text = null, from_part bigint = null, to_part bigint = null
-- Ask it:  what tells novels from scripture since 1813?  from approximate_contrast_within('austen', 'bible', '1813')
create or replace macro approximate_contrast_within(
    a, b, since := null, until := null, from_part := null, to_part := null
) as table
select *
from within_sample_contrast(a, b, false, since, until, from_part, to_part)
order by greatest(h_low, -h_high, 0) desc, abs(cohens_h) desc nulls last, feature_id;
