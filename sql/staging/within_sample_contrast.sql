-- How differently each feature fires in two roles or sources, counted in the sample of documents.
--
-- Grain:   one row per feature that fires in either of the two there, in no order.
-- Reads:   within_sample, stg_sample, every_part_has_sample, ratio_squares, effective_size, share_low, share_high,
--          cohens_h
-- Units:   rate is a share of the sampled tokens of the role, or source; null if it has none. Its interval is that of a
--          share (Wilson 1927) with the effective_size of its n_documents documents. The interval of cohens_h is put
--          together from those of the rates on the scale of h (Newcombe 1998), with the correlation of what each
--          document adds to both (Zou 2007). n_seen counts sampled tokens at which the feature fires. The arguments are
--          those of within_sample.
-- Ask it:  from within_sample_contrast('user', 'assistant', true, null, null, null, null)
create or replace macro within_sample_contrast(a, b, by_role, since, until, from_part, to_part) as table
with sides as materialized (
    from within_sample(a, b, by_role, since, until, from_part, to_part) where every_part_has_sample()
),
by_document as materialized (
    select
        owner,
        coalesce(max(n_encoded) filter (where is_a), count(*) filter (where is_a))::double as size_a,
        coalesce(max(n_encoded) filter (where is_b), count(*) filter (where is_b))::double as size_b
    from sides
    group by owner
),
own as materialized (
    select
        sum(size_a)                           as all_a,
        sum(size_b)                           as all_b,
        count(*) filter (where size_a > 0)    as n_documents_a,
        count(*) filter (where size_b > 0)    as n_documents_b,
        sum(size_a * size_a)                  as sizes_aa,
        sum(size_b * size_b)                  as sizes_bb,
        sum(size_a * size_b)                  as sizes_ab
    from by_document
),
counts as (
    select
        feature_id,
        owner,
        count(*) filter (where is_a)::double as hits_a,
        count(*) filter (where is_b)::double as hits_b
    from stg_sample
    join sides using (token_id)
    group by all
),
sums as (
    select
        feature_id,
        sum(hits_a)            as n_a,
        sum(hits_b)            as n_b,
        sum(hits_a * hits_a)   as hits_aa,
        sum(hits_b * hits_b)   as hits_bb,
        sum(hits_a * hits_b)   as hits_ab,
        sum(hits_a * size_a)   as hit_size_aa,
        sum(hits_a * size_b)   as hit_size_ab,
        sum(hits_b * size_a)   as hit_size_ba,
        sum(hits_b * size_b)   as hit_size_bb
    from counts
    join by_document using (owner)
    group by feature_id
),
-- Sums over all documents of the products of hits - rate * size, where most have no hit.
spread as (
    select
        feature_id,
        n_a,
        n_b,
        own.*,
        n_a / nullif(all_a, 0) as rate_a,
        n_b / nullif(all_b, 0) as rate_b,
        ratio_squares(rate_a, hits_aa, hit_size_aa, sizes_aa) as squares_a,
        ratio_squares(rate_b, hits_bb, hit_size_bb, sizes_bb) as squares_b,
        hits_ab - rate_b * hit_size_ab - rate_a * hit_size_ba + rate_a * rate_b * sizes_ab as products
    from sums
    cross join own
),
sizes as (
    select
        *,
        effective_size(coalesce(rate_a, 0), squares_a, all_a, n_documents_a) as a_size,
        effective_size(coalesce(rate_b, 0), squares_b, all_b, n_documents_b) as b_size,
        share_low(coalesce(rate_a, 0) * a_size, a_size)   as rate_a_low,
        share_high(coalesce(rate_a, 0) * a_size, a_size)  as rate_a_high,
        share_low(coalesce(rate_b, 0) * b_size, b_size)   as rate_b_low,
        share_high(coalesce(rate_b, 0) * b_size, b_size)  as rate_b_high,
        case
            when squares_a > 1e-9 and squares_b > 1e-9
                then greatest(least(products / sqrt(squares_a * squares_b), 1), -1)
            else 0
        end as correlation
    from spread
),
steps as (
    select
        *,
        cohens_h(rate_a, rate_b)        as h,
        cohens_h(rate_a, rate_a_low)    as a_down,
        cohens_h(rate_a_high, rate_a)   as a_up,
        cohens_h(rate_b, rate_b_low)    as b_down,
        cohens_h(rate_b_high, rate_b)   as b_up
    from sizes
)
select
    feature_id,
    rate_a,
    rate_a_low,
    rate_a_high,
    rate_b,
    rate_b_low,
    rate_b_high,
    h as cohens_h,
    h - sqrt(greatest(a_down * a_down + b_up * b_up - 2 * correlation * a_down * b_up, 0))  as h_low,
    h + sqrt(greatest(a_up * a_up + b_down * b_down - 2 * correlation * a_up * b_down, 0))  as h_high,
    n_a::bigint as n_seen_a,
    n_b::bigint as n_seen_b,
    n_documents_a,
    n_documents_b
from steps;
