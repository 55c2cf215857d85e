-- A feature's strongest, weaker and random tokens under a filter, with the values around them: one reading for three.
--
-- Grain:   one row per example. The rows with part 'strongest' are those of feature_contexts and come first, then those
--          with part 'band', as in feature_bands, then those with part 'random', in the order of their draw.
-- Reads:   under_filter_of_feature, token_windows, token_surroundings, draw_order, strength
-- Units:   n_strongest, n_band and n_random are the most examples of each part; n_band of each band. band, n_tokens,
--          low_value and high_value are those of feature_bands, null in the other parts. Random tokens are drawn apart
--          from those of the bands; the first 200 drawn are compared. The rest is as in feature_contexts and
--          feature_bands, which tell more; here the feature's values are read once.
-- Parameters: feature bigint, n_strongest bigint = 8, bands bigint = 5, n_band bigint = 2, n_random bigint = 4,
--          before bigint = 12, after bigint = 12, seed bigint = 0, source text = null, document_key text = null,
--          since text = null, until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  what does feature 12 stand for, from strong to weak?  from feature_examples(12)
create or replace macro feature_examples(
    feature,
    n_strongest := 8,
    bands := 5,
    n_band := 2,
    n_random := 4,
    before := 12,
    after := 12,
    seed := 0,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with fired as materialized (
    from under_filter_of_feature(
        feature, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
),
-- Few draws are as small as this; the first 200 of each band are among them, beyond any doubt.
small as materialized (
    select
        printf(
            '%08x',
            (4294967295 * least(1, 4 * bands * greatest(n_band, n_random, 200) / count(*)))::bigint
        ) as most
    from fired
    where passes
),
ranked as materialized (
    select
        token_id,
        value,
        rank,
        1 + rank * least(bands, n_rows) // n_rows as band,
        draw_order(token_id, seed)                as draw
    from (
        select
            token_id,
            value,
            row_number() over (order by strength(value) desc, token_id) - 1 as rank,
            count(*) over ()                                                as n_rows
        from fired
        where passes
    )
    where case when bands >= 1 then true else error('bands must be at least 1') end
),
wholes as (
    select
        band,
        count(*)             as n_tokens,
        min(strength(value)) as low_value,
        max(strength(value)) as high_value
    from ranked
    group by band
),
drawn as materialized (
    select 1 as part, null as band, row_number() over (order by rank) as number, token_id, value
    from ranked
    where rank < greatest(n_strongest, 1000)
    union all
    select 2, band, row_number() over (partition by band order by draw, token_id) as place, token_id, value
    from ranked
    where left(draw, 8) <= (select most from small)
    qualify place <= greatest(n_band, 200)
    union all
    select 3, null, row_number() over (order by substr(draw, 17), token_id) as place, token_id, value
    from ranked
    where substr(draw, 17, 8) <= (select most from small)
    qualify place <= greatest(n_random, 200)
),
examples as (
    select
        part,
        band,
        count(*)                  as n_copies,
        min(number)               as number,
        arg_min(token_id, number) as token_id,
        arg_min(value, number)    as value
    from drawn
    join token_windows((select list(distinct token_id) from drawn), before, after) using (token_id)
    group by part, band, text_key
),
chosen as materialized (
    from examples
    qualify row_number() over (partition by part, band order by number)
        <= case part when 1 then n_strongest when 2 then n_band else n_random end
)
select
    case part when 1 then 'strongest' when 2 then 'band' else 'random' end as part,
    chosen.band,
    wholes.n_tokens,
    wholes.low_value,
    wholes.high_value,
    token_id,
    chosen.value,
    found.place,
    found.pieces,
    found.feature_values,
    chosen.n_copies,
    found.key,
    found.source,
    found.position
from chosen
left join wholes using (band)
join token_surroundings(
    (select list(distinct token_id) from chosen), (select list(fired) from fired), before, after
) as found using (token_id)
order by chosen.part, chosen.band, case chosen.part when 3 then number end, strength(chosen.value) desc, token_id;
