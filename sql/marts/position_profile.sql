-- How often and how strongly a feature fires at each position of the sequence.
--
-- Grain:   one row per band of encoded positions, in order.
-- Reads:   stg_feature_positions, stg_encoded_tokens, stg_shape, every_part_counts
-- Units:   a band goes from first_position to last_position; its width doubles from band to band. rate is a share of
--          the band's encoded tokens. mean_value is the mean over the tokens at which the feature fires there, in the
--          units of the activations (null if it never fires).
-- Parameters: feature bigint
-- Ask it:  does feature 12 only fire at the start?  from position_profile(12)
create or replace macro position_profile(feature) as table
with encoded as (
    select band, sum(n_tokens)::bigint as n_encoded from stg_encoded_tokens group by band
),
found as (
    select band, n_tokens, sum_value from stg_feature_positions where feature_id = feature
)
select
    case when band = 0 then 0 else 1::bigint << (band - 1) end                    as first_position,
    least(case when band = 0 then 0 else (1::bigint << band) - 1 end, context_length - 1) as last_position,
    encoded.n_encoded,
    coalesce(found.n_tokens, 0)                                                   as n_tokens,
    coalesce(found.n_tokens, 0) / encoded.n_encoded                               as rate,
    found.sum_value / found.n_tokens                                              as mean_value
from encoded
left join found using (band)
cross join stg_shape
where feature between 0 and n_features - 1 and every_part_counts()
order by band;
