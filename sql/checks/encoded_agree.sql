-- At least as many tokens were encoded as fire, and no more than there are. Finds nothing if an earlier saeflow stored
-- no counts.
--
-- Grain:   one row per (source, band) with a wrong count; is_all marks a band whose sources together have a wrong
--          count.
-- Reads:   stg_encoded_tokens, stg_token_major, stg_tokens, stg_documents, stg_shape, stg_left_out,
--          position_band
-- Units:   n_real counts the real tokens there whose vectors are not too long, n_fired those at which a feature fires;
--          n_encoded must lie between them. A single source may have fewer if a part counts sources together.
-- Ask it:  are rates shares of the right number?
with encoded as materialized (
    select source, band, false as is_all, n_tokens as n_encoded from stg_encoded_tokens where not is_rest
    union all
    select null, band, true, sum(n_tokens) from stg_encoded_tokens group by band
),
found as materialized (
    select stg_documents.source, position_band(stg_tokens.position) as band, count(*) as n_real
    from stg_tokens
    join stg_documents using (document_id)
    where stg_tokens.mask and stg_tokens.token_id not in (select token_id from stg_left_out)
    group by all
),
real_tokens as (
    select source, band, false as is_all, n_real from found
    union all
    select null, band, true, sum(n_real) from found group by band
),
fired as (
    select position_band(token_id % context_length) as band, count(*) as n_fired
    from (select distinct token_id from stg_token_major)
    cross join stg_shape
    group by band
)
select encoded.source, encoded.band, encoded.is_all, n_fired, n_encoded, n_real
from encoded
full join real_tokens
    on encoded.source is not distinct from real_tokens.source
    and encoded.band = real_tokens.band
    and encoded.is_all = real_tokens.is_all
left join fired
    on fired.band = coalesce(encoded.band, real_tokens.band)
    and coalesce(encoded.is_all, real_tokens.is_all)
where (select has_marginals from stg_shape)
    and (coalesce(n_encoded, 0) > coalesce(n_real, 0) or coalesce(n_encoded, 0) < coalesce(n_fired, 0))
order by 1, 2, 3;
