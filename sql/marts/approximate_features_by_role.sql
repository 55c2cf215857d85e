-- How differently each feature fires in what two roles wrote, in a sample: an estimate of features_by_role.
--
-- Grain:   one row per feature that fires in either of the two there, what is surely the largest effect first.
-- Reads:   within_sample_contrast
-- Units:   rates and cohens_h are those of features_by_role, whose figures they estimate: 95 of 100 samples have the
--          true one from low to high. The sample is that of approximate_coactivation: n_seen counts its tokens of the
--          role at which the feature fires, n_documents its documents with tokens of the role. The intervals are those
--          of a feature chosen beforehand: see within_sample_contrast. Features that do not fire in the sample are no
--          row.
-- Parameters: a text, b text
-- Ask it:  what has the assistant's voice, about?  from approximate_features_by_role('assistant', 'user')
create or replace macro approximate_features_by_role(a, b) as table
select *
from within_sample_contrast(a, b, true, null, null, null, null)
order by greatest(h_low, -h_high, 0) desc, abs(cohens_h) desc nulls last, feature_id;
