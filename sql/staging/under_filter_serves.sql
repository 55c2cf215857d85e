-- True if stored counts of sources are exact under a filter.
--
-- Grain:   scalar.
-- Reads:   stg_shape, stg_encoded_tokens, stg_hidden_values
-- Units:   the arguments are those of under_filter_ids; null means no filter. Stored counts serve if nothing but a
--          source is asked for, every source is counted apart, and no value is hidden.
-- Ask it:  select under_filter_serves('novels', null, null, null, null)
create or replace macro under_filter_serves(source, document_key, since, until, role) as
(
    coalesce(document_key, since, until, role) is null
    and (select has_marginals from stg_shape)
    and not coalesce((select bool_or(is_rest) from stg_encoded_tokens), false)
    and not exists (from stg_hidden_values)
);
