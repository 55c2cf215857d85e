-- Examples of a feature from its strongest to its weakest tokens, so that its peaks alone do not mislead.
--
-- Grain:   one row per example, at most n in each band; the strongest band first, and the strongest example first
--          inside it.
-- Reads:   tokens_of_feature, token_texts
-- Units:   bands are quantiles, sampled as by Paulo et al. 2024 (arXiv 2410.13928): the feature's tokens are ordered by
--          value and cut into bands of equal counts (to within one; equal values in corpus order); band 1 is the
--          strongest. Examples are spread evenly over a band. n_tokens, low_value and high_value describe the whole
--          band. Values are in the units of the activations; context shows 12 tokens on either side.
-- Parameters: feature bigint, bands bigint = 10, n bigint = 5
-- Ask it:  what does feature 12 stand for when it is weak?  from feature_quantile_examples(12)
create or replace macro feature_quantile_examples(feature, bands := 10, n := 5) as table
with ranked as (
    select
        token_id,
        value,
        row_number() over (order by value desc, token_id) - 1 as rank,
        count(*) over ()                                      as n_rows
    from tokens_of_feature(feature)
),
banded as (
    select
        *,
        1 + rank * least(bands, n_rows) // n_rows as band
    from ranked
    where case when bands >= 1 and n >= 1 then true else error('bands and n must be at least 1') end
),
placed as (
    select
        *,
        row_number() over (partition by band order by rank) - 1 as place,
        count(*) over (partition by band)                        as n_tokens,
        min(value) over (partition by band)                      as low_value,
        max(value) over (partition by band)                      as high_value
    from banded
),
-- Place p of m is one of k evenly spread ones if a multiple of m / k falls on it.
chosen as materialized (
    select band, n_tokens, low_value, high_value, token_id, value
    from (select *, least(n, n_tokens) as n_chosen from placed)
    where (place + 1) * n_chosen // n_tokens > place * n_chosen // n_tokens
)
select
    chosen.band,
    chosen.n_tokens,
    chosen.low_value,
    chosen.high_value,
    token_id,
    chosen.value,
    found.piece,
    found.context,
    found.key,
    found.source,
    found.position
from chosen
join token_texts((select list(token_id) from chosen), 12, 12) as found using (token_id)
order by chosen.band, chosen.value desc, token_id;
