-- A token between its neighbours as text. A letter whose bytes are spread over several tokens goes to
-- the token as a whole; half letters at the far edges are dropped.
--
-- Grain:   scalar: a struct of text_before, token_text and text_after.
-- Reads:   open_letter, letter_rest, lossy_text
-- Units:   bytes come as hexadecimal digits, two a byte.
-- Ask it:  select whole_letters('20E2', '82', 'AC20')  -- the euro sign between two spaces
create or replace macro whole_letters(before_digits, token_digits, after_digits) as (
    select {
        'text_before': lossy_text(
            regexp_replace(left(before_digits, length(before_digits) - length(lead)), '^(?:[89AB].){1,3}', '')
        ),
        'token_text': lossy_text(lead || token_digits || rest),
        'text_after': lossy_text(
            left(
                substr(after_digits, length(rest) + 1),
                length(after_digits) - length(rest) - length(open_letter(substr(after_digits, length(rest) + 1)))
            )
        )
    }
    from (
        select
            lead,
            case when open_letter(lead || token_digits) = '' then '' else letter_rest(after_digits) end as rest
        from (
            select case when letter_rest(token_digits) = '' then '' else open_letter(before_digits) end as lead
        )
    )
);
